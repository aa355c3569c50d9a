/* A guest owner's side of an SEV launch on the ioctls alone: INIT2, LAUNCH_START to LAUNCH_FINISH of a type-2 VM, its one page of
 * code encrypted, the VM run; and /dev/sev. With the argument "asids": VMs one after the other while there is one ASID.
 */
#include "mini.h"

struct mini_cmd { uint32_t id, pad; uint64_t data; uint32_t error, sev_fd; };
struct mini_init2 { uint64_t vmsa_features; uint32_t flags; uint16_t ghcb_version, pad1; uint32_t pad2[8]; };
struct mini_start { uint32_t handle, policy; uint64_t dh; uint32_t dh_len, pad0; uint64_t session; uint32_t session_len, pad1; };
struct mini_bytes { uint64_t address; uint32_t len, pad; };
struct mini_status { uint32_t handle, policy, state; };
struct __attribute__((packed)) mini_issue { uint32_t cmd; uint64_t data; uint32_t error; };
struct mini_platform { uint8_t major, minor, state; uint32_t flags; uint8_t build; uint32_t guests; } __attribute__((packed));

static int psp;

static long command(int vm, int id, void *data)
{
	struct mini_cmd cmd = { .id = id, .data = ADDRESS(data), .sev_fd = psp };
	long result = call(vm, KVM_MEMORY_ENCRYPT_OP, &cmd);

	if (result)
		printf("command %d: firmware error %u\n", id, cmd.error);
	return result;
}

static int sev_vm(int kvm)
{
	struct mini_init2 init = { 0 };
	int vm = must(ioctl(kvm, KVM_CREATE_VM, 2), "KVM_CREATE_VM of type 2");

	expect("INIT2", command(vm, 22, &init), 0);
	return vm;
}

static int with_one_asid(int kvm)
{
	struct mini_init2 init = { 0 };

	for (int i = 0; i < 20; i++) {
		int vm = sev_vm(kvm), copy = dup(vm), vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
		void *map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, vcpu, 0);
		int other = must(ioctl(kvm, KVM_CREATE_VM, 2), "a second VM");

		expect("a second VM has no ASID", command(other, 22, &init), -EBUSY);
		close(vm), close(copy);
		expect("  nor while a vCPU is open", command(other, 22, &init), -EBUSY);
		close(vcpu);
		expect("  nor while kvm_run is mapped", command(other, 22, &init), -EBUSY);
		munmap(map, PAGE);
		expect("  at last", command(other, 22, &init), 0);
		close(other);
	}
	return verdict();
}

int main(int argc, char **argv)
{
	struct mini_start start = { .policy = 1 };
	uint8_t *ram = fresh_ram(16 * PAGE), measure[64];
	struct mini_bytes code = { ADDRESS(ram) + ENTRY, PAGE }, blob = { 0, 0 };
	struct mini_platform platform = { 0 };
	struct mini_issue issue = { .cmd = 1, .data = ADDRESS(&platform) };
	struct mini_status status = { 0 };
	struct kvm_enc_region region = { ADDRESS(ram), 16 * PAGE };
	struct machine m = { .kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), .ram = ram };

	psp = must(open("/dev/sev", O_RDWR), "/dev/sev");
	expect("an SEV type", (ioctl(m.kvm, KVM_CHECK_EXTENSION, 235) >> 2) & 1, 1);
	if (argc > 1)
		return with_one_asid(m.kvm);
	expect("PLATFORM_STATUS", call(psp, _IOWR('S', 0, struct mini_issue), &issue), 0);
	expect("  API 0.x or 1.x", platform.major <= 1 && platform.minor > 0, 1);
	m.vm = sev_vm(m.kvm);
	expect("region", set_region(m.vm, 0, 0, ram, 16 * PAGE), 0);
	expect("MEMORY_ENCRYPT_REG_REGION", call(m.vm, KVM_MEMORY_ENCRYPT_REG_REGION, &region), 0);
	m.vcpu = add_vcpu(&m, 0, &m.run);
	memcpy(ram + ENTRY, OUT_AND_HLT, sizeof(OUT_AND_HLT) - 1);
	expect("LAUNCH_START", command(m.vm, 2, &start), 0);
	expect("LAUNCH_UPDATE_DATA", command(m.vm, 3, &code), 0);
	expect("the code is no plaintext now", memcmp(ram + ENTRY, OUT_AND_HLT, sizeof(OUT_AND_HLT) - 1) != 0, 1);
	expect("LAUNCH_MEASURE, for its length", command(m.vm, 6, &blob), -EIO);
	expect("  which is", blob.len, 48);
	blob.address = ADDRESS(measure);
	expect("LAUNCH_MEASURE", command(m.vm, 6, &blob), 0);
	expect("LAUNCH_FINISH", command(m.vm, 7, NULL), 0);
	expect("GUEST_STATUS", command(m.vm, 16, &status), 0);
	expect("  running", status.state, 3);
	expect("  policy", status.policy, 1);
	expect("LAUNCH_UPDATE_DATA is over", command(m.vm, 3, &code), -EIO);
	start_at(m.vcpu, ENTRY);
	expect("KVM_RUN", run(&m), KVM_EXIT_IO);
	expect("  byte", io_byte(m.run), 'X');
	return verdict();
}
