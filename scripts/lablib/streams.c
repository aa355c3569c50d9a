/*
 * Bytes between the job and the host, over virtio serial ports:
 *
 *   1 its stdin     2 its stdout     3 its stderr     4 control, lines of text
 *
 * To the host:   "up SECONDS" the job starts; "exit STATUS"; "fail WORDS" there is no job to speak of.
 * From the host: "go" first of all; "eof BYTES" so much stdin and no more; "signal N"; "size ROWS COLUMNS".
 *
 * A port's end of file is not used: before the host's side is announced to the guest, reading a port looks the same.
 * The job is over when it has ended and its output is closed, or silent for a while: something it left behind may hold
 * it open.
 */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SILENCE_MS = 500 };

static int port[PORTS];
static char pending[65536]; /* stdin that the job has not taken yet */
static size_t pending_start, pending_end;
static long long stdin_seen, stdin_total = -1;

static void pause_ms(int ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000L };

	nanosleep(&t, NULL);
}

double uptime(void)
{
	struct timespec t;

	clock_gettime(CLOCK_BOOTTIME, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int write_all(int fd, const char *data, size_t length)
{
	while (length > 0) {
		ssize_t n = write(fd, data, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		data += n;
		length -= n;
	}
	return 0;
}

void tell(const char *format, ...)
{
	char line[512];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	if (n >= (int)sizeof(line))
		n = sizeof(line) - 1;
	if (port[CTL] > 0)
		write_all(port[CTL], line, n);
	else
		write_all(2, line, n);
}

void power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

void fail(const char *what)
{
	tell("fail %s: %s\n", what, strerror(errno));
	power_off();
}

/* The port's device is named after its place among all virtio devices, which is QEMU's to choose. */
static int open_port(int number, int flags)
{
	char name[32];
	int device, fd;

	for (device = 0; device < 8; device++) {
		snprintf(name, sizeof(name), "/dev/vport%dp%d", device, number);
		fd = open(name, flags | O_CLOEXEC);
		if (fd >= 0 || errno != ENOENT)
			return fd;
	}
	return -1;
}

void open_ports(void)
{
	static const int flags[PORTS] = { 0, O_RDONLY | O_NONBLOCK, O_WRONLY, O_WRONLY, O_RDWR };
	int i, waited;

	for (i = CTL; i >= IN; i--) { /* control first: it carries the bad news about the others */
		for (waited = 0; (port[i] = open_port(i, flags[i])) < 0 && waited < START_MS; waited += 5)
			pause_ms(5);
		if (port[i] < 0)
			fail("a virtio serial port");
	}
}

static void drop(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void obey(struct job *job, const char *line)
{
	struct winsize size = { 0 };
	int number;

	if (sscanf(line, "signal %d", &number) == 1 && !job->ended)
		kill(-job->pid, number);
	else if (sscanf(line, "eof %lld", &stdin_total) == 1)
		return;
	else if (sscanf(line, "size %hu %hu", &size.ws_row, &size.ws_col) == 2 && job->tty)
		ioctl(job->from, TIOCSWINSZ, &size);
}

static void read_control(struct job *job)
{
	static char line[256];
	static size_t length;
	char c;
	struct pollfd more = { port[CTL], POLLIN, 0 };

	while (poll(&more, 1, 0) == 1 && (more.revents & POLLIN) && read(port[CTL], &c, 1) == 1) {
		if (c != '\n' && length < sizeof(line) - 1) {
			line[length++] = c;
			continue;
		}
		line[length] = 0;
		length = 0;
		obey(job, line);
	}
}

void wait_for_go(void)
{
	struct pollfd control = { port[CTL], POLLIN, 0 };
	int waited;

	for (waited = 0; waited < START_MS; waited += 5) {
		control.revents = 0;
		poll(&control, 1, 0);
		if (control.revents & POLLIN)
			return; /* the word itself is read, and ignored, with the others */
		pause_ms(5);
	}
	errno = ETIMEDOUT;
	fail("the host's first word");
}

/* Bytes of the job's output to a port; whether there were any. Closes the pipe at its end. */
static int carry(int *from, int to)
{
	static char data[65536];
	ssize_t n = read(*from, data, sizeof(data));

	if (n > 0) {
		write_all(to, data, n);
		return 1;
	}
	if (n == 0 || (errno != EAGAIN && errno != EINTR))
		drop(from);
	return 0;
}

static void feed(struct job *job, int readable, int writable)
{
	ssize_t n;

	if (readable && pending_start == pending_end) {
		n = read(port[IN], pending, sizeof(pending));
		pending_start = 0;
		pending_end = n > 0 ? n : 0;
		stdin_seen += pending_end;
	}
	if (writable && pending_start < pending_end) {
		n = write(job->to, pending + pending_start, pending_end - pending_start);
		if (n > 0)
			pending_start += n;
		else if (n < 0 && errno != EAGAIN && errno != EINTR)
			drop(&job->to); /* the job has closed its stdin */
	}
	if (stdin_total >= 0 && stdin_seen >= stdin_total && pending_start == pending_end && !job->tty)
		drop(&job->to);
}

static void reap(struct job *job, int signals)
{
	struct signalfd_siginfo info;
	pid_t pid;
	int how;

	while (read(signals, &info, sizeof(info)) > 0)
		;
	while ((pid = waitpid(-1, &how, WNOHANG)) > 0) {
		if (pid == job->pid) {
			job->ended = 1;
			job->status = WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
		}
	}
}

void serve(struct job *job, int signals)
{
	double quiet_since = uptime();

	while (!job->ended || job->from >= 0 || job->errors >= 0) {
		int room = job->to >= 0 && pending_start == pending_end, active = 0;
		struct pollfd fds[] = {
			{ signals, POLLIN, 0 },
			{ port[CTL], POLLIN, 0 },
			{ job->from, POLLIN, 0 },
			{ job->errors, POLLIN, 0 },
			{ room ? port[IN] : -1, POLLIN, 0 },
			{ job->to >= 0 && !room ? job->to : -1, POLLOUT, 0 },
		};

		poll(fds, sizeof(fds) / sizeof(fds[0]), job->ended ? SILENCE_MS / 5 : -1);
		if (fds[0].revents)
			reap(job, signals);
		if (fds[1].revents & POLLIN)
			read_control(job);
		if (fds[2].revents)
			active |= carry(&job->from, port[OUT]);
		if (fds[3].revents)
			active |= carry(&job->errors, port[ERR]);
		if (job->to >= 0)
			feed(job, fds[4].revents & POLLIN, 1);
		if (active || !job->ended)
			quiet_since = uptime();
		else if (uptime() - quiet_since > SILENCE_MS / 1000.0)
			return;
		if ((fds[1].revents | fds[4].revents) & POLLHUP)
			pause_ms(20); /* the host's side is away: no need to turn fast */
	}
}

