"""In-kernel interrupt controllers of the model: local APICs, the IOAPIC, routing, MSIs, irqfds and ioeventfds."""
