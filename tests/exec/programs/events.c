/* Eventfds: a guest's OUT signals one without an exit (IOEVENTFD), from any process's fd; what IRQFD and IOEVENTFD refuse. */
#include "mini.h"

#define TWO_OUTS "\xb0\x05\xe6\x20\xb0\x06\xe6\x20\xf4" /* mov al, 5; out 0x20, al; mov al, 6; out 0x20, al; hlt */

static long counted(int fd)
{
	uint64_t value = 0;

	return read(fd, &value, 8) == 8 ? (long)value : -errno;
}

int main(void)
{
	int event = eventfd(0, EFD_NONBLOCK), copy = dup(event), ends[2];
	struct kvm_ioeventfd io = { .addr = 0x20, .len = 1, .fd = event, .flags = KVM_IOEVENTFD_FLAG_PIO };
	struct kvm_irqfd irq = { .fd = event, .gsi = 4 };
	struct machine m;

	GUEST(&m, NULL, 16 * PAGE, TWO_OUTS);
	expect("KVM_IOEVENTFD", call(m.vm, KVM_IOEVENTFD, &io), 0);
	expect("the same again", call(m.vm, KVM_IOEVENTFD, &io), -EEXIST);
	expect("the guest halts without an exit for its OUTs", run(&m), KVM_EXIT_HLT);
	expect("the eventfd", counted(event), 2);
	expect("it is empty now", counted(event), -EAGAIN);
	close(event);
	start_at(m.vcpu, ENTRY);
	expect("with the fd closed here", run(&m), KVM_EXIT_HLT);
	expect("its duplicate counts", counted(copy), 2);
	io.fd = copy, io.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
	expect("taken off by the duplicate", call(m.vm, KVM_IOEVENTFD, &io), 0);
	expect("and again", call(m.vm, KVM_IOEVENTFD, &io), -ENOENT);
	start_at(m.vcpu, ENTRY);
	expect("now the OUT exits", run(&m), KVM_EXIT_IO);
	expect("nothing counts", counted(copy), -EAGAIN);

	io = (struct kvm_ioeventfd){ .addr = 0x20, .len = 1, .fd = copy, .flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH, .datamatch = 6 };
	expect("for one value", call(m.vm, KVM_IOEVENTFD, &io), 0);
	start_at(m.vcpu, ENTRY);
	expect("the other value exits", run(&m), KVM_EXIT_IO);
	expect("  it is", io_byte(m.run), 5);
	expect("then the halt", run(&m), KVM_EXIT_HLT);
	expect("one counts", counted(copy), 1);

	io = (struct kvm_ioeventfd){ .addr = 0x30, .len = 1, .fd = -1, .flags = KVM_IOEVENTFD_FLAG_PIO };
	expect("fd -1", call(m.vm, KVM_IOEVENTFD, &io), -EBADF);
	io.fd = 9999;
	expect("fd 9999", call(m.vm, KVM_IOEVENTFD, &io), -EBADF);
	io.fd = m.vm;
	expect("a VM's fd", call(m.vm, KVM_IOEVENTFD, &io), -EINVAL);
	io.fd = (pipe(ends), ends[1]);
	expect("a pipe", call(m.vm, KVM_IOEVENTFD, &io), -EINVAL);
	irq.fd = copy;
	expect("KVM_IRQFD without an interrupt controller", call(m.vm, KVM_IRQFD, &irq), -EINVAL);

	GUEST(&m, NULL, 16 * PAGE, OUT_AND_HLT);
	close(m.vcpu), close(m.vm);
	m.vm = ioctl(m.kvm, KVM_CREATE_VM, 0);
	if (call(m.vm, KVM_CREATE_IRQCHIP, 0))
		unavailable("an interrupt controller in the kernel");
	expect("KVM_IRQFD", call(m.vm, KVM_IRQFD, &irq), 0);
	expect("the same eventfd again", call(m.vm, KVM_IRQFD, &irq), -EBUSY);
	irq.fd = 9999;
	expect("fd 9999", call(m.vm, KVM_IRQFD, &irq), -EBADF);
	irq.fd = ends[0];
	expect("a pipe", call(m.vm, KVM_IRQFD, &irq), -EINVAL);
	irq.fd = copy, irq.flags = KVM_IRQFD_FLAG_DEASSIGN;
	expect("taken off", call(m.vm, KVM_IRQFD, &irq), 0);
	expect("write to it still works", write(copy, &(uint64_t){ 3 }, 8), 8);
	for (int i = 0; i < 1000 && counted(copy) != 3; i++)
		usleep(1000), i == 999 ? expect("nobody took it", i, 0) : (void)0;
	return verdict();
}
