/* Fds that travel: a VM and /dev/kvm through SCM_RIGHTS to another process, which may use what does not belong to a process. */
#include "mini.h"

static void send_fds(int socket, int one, int two)
{
	union { char room[CMSG_SPACE(2 * sizeof(int))]; struct cmsghdr align; } control = { 0 };
	struct msghdr message = { .msg_iov = &(struct iovec){ "x", 1 }, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);

	head->cmsg_level = SOL_SOCKET, head->cmsg_type = SCM_RIGHTS, head->cmsg_len = CMSG_LEN(2 * sizeof(int));
	((int *)CMSG_DATA(head))[0] = one, ((int *)CMSG_DATA(head))[1] = two;
	expect("sendmsg", sendmsg(socket, &message, 0), 1);
}

static void receive_fds(int socket, int *fds)
{
	union { char room[CMSG_SPACE(2 * sizeof(int))]; struct cmsghdr align; } control;
	struct msghdr message = { .msg_iov = &(struct iovec){ (char[1]){ 0 }, 1 }, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };

	expect("recvmsg", recvmsg(socket, &message, 0), 1);
	memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), 2 * sizeof(int));
}

int main(void)
{
	int pair[2], fds[2], status, kvm;
	struct machine m;
	pid_t pid;

	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	pid = fork();
	if (!pid) {
		receive_fds(pair[1], fds);
		expect("receiver: /dev/kvm", call(fds[0], KVM_GET_API_VERSION, 0), 12);
		expect("receiver: makes a VM of it", call(fds[0], KVM_CREATE_VM, 0) > 0, 1);
		expect("receiver: the sender's VM", call(fds[1], KVM_CREATE_VCPU, (void *)1), -EIO);
		expect("receiver: map of a VM", mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fds[1], 0) == MAP_FAILED, 1);
		_exit(verdict());
	}
	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	send_fds(pair[0], m.kvm, m.vm);
	close(m.kvm);
	expect("sender runs on", run(&m), KVM_EXIT_IO);
	waitpid(pid, &status, 0);
	expect("receiver's status", status, 0);
	expect("sender runs on", run(&m), KVM_EXIT_IO);

	/* One that is in flight only, and comes back to its owner. */
	kvm = open("/dev/kvm", O_RDWR);
	send_fds(pair[0], kvm, m.vcpu);
	close(kvm), close(m.vcpu);
	receive_fds(pair[1], fds);
	m.vcpu = fds[1];
	expect("a vCPU that came back", run(&m), KVM_EXIT_IO);
	expect("/dev/kvm that came back", call(fds[0], KVM_GET_API_VERSION, 0), 12);
	return verdict();
}
