"""The SEV firmware and KVM's SEV commands, as far as the model has them."""
