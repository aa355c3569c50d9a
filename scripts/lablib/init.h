/* What the two halves of the lab's first process share: init.c prepares and starts the job, streams.c carries its bytes. */
#ifndef LAB_INIT_H
#define LAB_INIT_H

#include <sys/ioctl.h>
#include <sys/types.h>
#include <termios.h>

enum { IN = 1, OUT, ERR, CTL, PORTS };
enum { START_MS = 20000 }; /* for the ports to appear, and for the host's first word */

struct job {
	char **argv, **envp, *cwd;
	int tty;
	struct winsize size;
	pid_t pid;
	int to, from, errors; /* our ends of its pipes, or the terminal's master; -1 once closed */
	int ended, status;
};

/* streams.c */
void open_ports(void);
void wait_for_go(void);
void tell(const char *format, ...);
void fail(const char *what);
void power_off(void);
double uptime(void);
void serve(struct job *job, int signals);

#endif
