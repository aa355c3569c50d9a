/* The smallest VMM: a real-mode guest in private memory writes to a port and halts; memory is seen both ways. */
#include "mini.h"

int main(void)
{
	struct machine m;
	struct kvm_regs regs;

	GUEST(&m, NULL, 16 * PAGE, ADD_AND_TELL);
	expect("API version", ioctl(m.kvm, KVM_GET_API_VERSION, 0), 12);
	for (int i = 0; i < 3; i++) {
		m.ram[0x2000] = 10 * i;
		expect("exit", run(&m), KVM_EXIT_IO);
		expect("direction", m.run->io.direction, KVM_EXIT_IO_OUT);
		expect("port", m.run->io.port, 0x10);
		expect("size", m.run->io.size, 1);
		expect("byte", io_byte(m.run), 10 * i + 1);
		expect("stored by the guest", m.ram[0x2001], 10 * i + 1);
	}
	memcpy(m.ram + 0x3000, OUT_AND_HLT, sizeof(OUT_AND_HLT));
	start_at(m.vcpu, 0x3000);
	expect("exit of new code", run(&m), KVM_EXIT_IO);
	expect("its byte", io_byte(m.run), 'X');
	expect("then", run(&m), KVM_EXIT_HLT);
	expect("KVM_GET_REGS", call(m.vcpu, KVM_GET_REGS, &regs), 0);
	expect("RIP", regs.rip, 0x3005);
	expect("immediate_exit", (m.run->immediate_exit = 1, run(&m)), -EINTR);
	expect("  leaves the exit reason of", m.run->exit_reason, KVM_EXIT_HLT);
	expect("close vcpu", close(m.vcpu), 0);
	expect("kvm_run stays mapped", m.run->exit_reason, KVM_EXIT_HLT);
	expect("close vm", close(m.vm), 0);
	expect("ioctl on a closed fd", call(m.vm, KVM_CHECK_EXTENSION, (void *)3), -EBADF);
	expect("a call on a pipe", (pipe((int[2]){ 0 }), call(0, KVM_GET_API_VERSION, 0)), -ENOTTY);
	return verdict();
}
