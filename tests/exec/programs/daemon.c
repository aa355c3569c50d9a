/* A daemon in the usual manner: forks twice, leaves the session, closes every fd, outlives its parent, and then uses KVM.
 * Argument: the file in which it tells how that went.
 */
#include "mini.h"

int main(int argc, char **argv)
{
	struct machine m;
	int status, ready[2], parent;
	char byte;

	pipe(ready);
	if (fork()) {
		close(ready[1]);
		wait(&status);
		expect("parent's other end", read(ready[0], &byte, 1), 1);
		return verdict(); /* while the daemon still starts */
	}
	setsid();
	parent = getpid();
	if (fork())
		_exit(0);
	write(ready[1], "x", 1);
	while (getppid() == parent)
		usleep(1000); /* until our parent is gone; its parent ends soon */
	syscall(SYS_close_range, 0, ~0U, 0);
	usleep(200000);
	if (open("/dev/null", O_RDWR) != 0 || open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0600) != 1 || dup(1) != 2)
		_exit(1);
	for (int i = 0; i < 3; i++) {
		GUEST(&m, NULL, 16 * PAGE, OUT_AND_HLT);
		expect("daemon's guest", run(&m), KVM_EXIT_IO);
		expect("its byte", io_byte(m.run), 'X');
	}
	return verdict();
}
