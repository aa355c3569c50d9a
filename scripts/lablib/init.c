/*
 * The first process of the lab's guest: makes the host's root usable, runs one job, powers off.
 *
 * 1. Mount what a program expects (proc, sys, dev, ...), the host's root over 9p, read-only, and on it an overlay whose
 *    upper layer is in memory. The overlay becomes the root: everything of the host is there, nothing of it can change.
 * 2. Read the job from /job of the initramfs: "key=value" strings, each ended by NUL. Keys: arg (one per argument), env
 *    (one per variable), cwd, tty ("ROWS COLUMNS": run it on a terminal).
 * 3. Run it; streams.c carries bytes between it and the host, and says when it has ended.
 * 4. Say so, and power off.
 */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST_STRINGS = 4096 };

static char *job_argv[MOST_STRINGS], *job_envp[MOST_STRINGS];
static struct job job = { .argv = job_argv, .envp = job_envp, .cwd = "/", .to = -1, .from = -1, .errors = -1 };

static void must_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	char what[160];

	if (mount(source, target, type, flags, data) == 0)
		return;
	snprintf(what, sizeof(what), "mount %s on %s", type, target);
	fail(what);
}

/* What only some programs want: its absence is theirs to notice. */
static void may_mount(const char *type, const char *target, const char *data)
{
	mkdir(target, 0755);
	mount(type, target, type, 0, data);
}

static void read_job(void)
{
	static char text[1 << 20];
	int fd = open("/job", O_RDONLY | O_CLOEXEC), args = 0, envs = 0;
	ssize_t n, length = 0;
	char *at, *value;

	if (fd < 0)
		fail("/job");
	while ((n = read(fd, text + length, sizeof(text) - 1 - length)) > 0)
		length += n;
	close(fd);
	for (at = text; at < text + length; at += strlen(at) + 1 + strlen(value) + 1) {
		value = strchr(at, '=');
		if (!value)
			break;
		*value++ = 0;
		if (!strcmp(at, "arg") && args < MOST_STRINGS - 1)
			job_argv[args++] = value;
		else if (!strcmp(at, "env") && envs < MOST_STRINGS - 1)
			job_envp[envs++] = value;
		else if (!strcmp(at, "cwd"))
			job.cwd = value;
		else if (!strcmp(at, "tty"))
			job.tty = sscanf(value, "%hu %hu", &job.size.ws_row, &job.size.ws_col) == 2;
	}
	if (args == 0) {
		errno = EINVAL;
		fail("/job names no command");
	}
}

static void host_root(void)
{
	must_mount("host", "/host", "9p", MS_RDONLY, "trans=virtio,version=9p2000.L,msize=512000,cache=loose,access=any");
	must_mount("rw", "/rw", "tmpfs", 0, "mode=0755");
	if (mkdir("/rw/upper", 0755) || mkdir("/rw/work", 0755))
		fail("/rw");
	must_mount("lab", "/root", "overlay", 0, "lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work");
	must_mount("proc", "/root/proc", "proc", 0, NULL);
	must_mount("sysfs", "/root/sys", "sysfs", 0, NULL);
	must_mount("devtmpfs", "/root/dev", "devtmpfs", 0, NULL);
	must_mount("tmpfs", "/root/run", "tmpfs", 0, "mode=0755");
	if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		fail("changing to the host's root");
	may_mount("devpts", "/dev/pts", "mode=0600,ptmxmode=0666");
	may_mount("tmpfs", "/dev/shm", "mode=1777");
	may_mount("hugetlbfs", "/dev/hugepages", NULL);
	may_mount("debugfs", "/sys/kernel/debug", NULL);
	mkdir("/run/lock", 01777);
	mkdir("/run/tmp", 01777);
	symlink("/proc/self/fd", "/dev/fd");
	symlink("fd/0", "/dev/stdin");
	symlink("fd/1", "/dev/stdout");
	symlink("fd/2", "/dev/stderr");
}

static void loopback(void)
{
	struct ifreq request = { .ifr_name = "lo" };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return;
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	ioctl(fd, SIOCSIFFLAGS, &request);
	close(fd);
}

static void become_job(int in, int out, int err)
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	if (job.tty)
		ioctl(in, TIOCSCTTY, 0);
	dup2(in, 0);
	dup2(out, 1);
	dup2(err, 2);
	environ = job_envp;
	if (chdir(job.cwd))
		dprintf(2, "lab: %s: %s\n", job.cwd, strerror(errno));
	execvp(job_argv[0], job_argv);
	dprintf(2, "lab: cannot run %s: %s\n", job_argv[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

static void start_on_terminal(void)
{
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC), slave;

	if (master < 0 || unlockpt(master))
		fail("/dev/ptmx");
	slave = open(ptsname(master), O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (slave < 0)
		fail("the terminal's other side");
	ioctl(master, TIOCSWINSZ, &job.size);
	job.pid = fork();
	if (job.pid < 0)
		fail("fork");
	if (job.pid == 0)
		become_job(slave, slave, slave);
	close(slave);
	fcntl(master, F_SETFL, O_NONBLOCK);
	job.from = master;
	job.to = dup(master);
}

static void start_on_pipes(void)
{
	int in[2], out[2], err[2];

	if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC))
		fail("pipe");
	job.pid = fork();
	if (job.pid < 0)
		fail("fork");
	if (job.pid == 0)
		become_job(in[0], out[1], err[1]);
	close(in[0]);
	close(out[1]);
	close(err[1]);
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	job.to = in[1];
	job.from = out[0];
	job.errors = err[0];
}

int main(void)
{
	sigset_t set;
	int signals;

	must_mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	open_ports();
	read_job();
	host_root();
	loopback();
	sethostname("lab", 3);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signals = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	if (signals < 0)
		fail("signalfd");
	wait_for_go();
	tell("up %.2f\n", uptime());
	if (job.tty)
		start_on_terminal();
	else
		start_on_pipes();
	serve(&job, signals);
	tell("exit %d\n", job.status);
	power_off();
	return 0;
}
