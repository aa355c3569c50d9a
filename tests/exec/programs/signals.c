/* Signals and KVM_RUN: EINTR with and without SA_RESTART, ignored and blocked signals, KVM_SET_SIGNAL_MASK, timers. */
#include "mini.h"

static struct machine m;
static volatile int handled;

static void note(int signal)
{
	handled += signal == SIGALRM || signal == SIGUSR1;
}

static void handle(int signal, void (*handler)(int), int flags)
{
	struct sigaction action = { .sa_handler = handler, .sa_flags = flags };

	sigaction(signal, &action, NULL);
}

static void alarm_in(int ms)
{
	struct itimerval timer = { .it_value = { .tv_usec = ms * 1000 } };

	setitimer(ITIMER_REAL, &timer, NULL);
}

static void *kick(void *thread)
{
	usleep(30000);
	pthread_kill((pthread_t)thread, SIGUSR2);
	usleep(30000);
	pthread_kill((pthread_t)thread, SIGUSR1);
	return NULL;
}

static void spin(const char *what, int wanted_handled)
{
	handled = 0;
	m.run->exit_reason = 99;
	expect(what, call(m.vcpu, KVM_RUN, 0), -EINTR);
	expect("  exit reason", m.run->exit_reason, KVM_EXIT_INTR);
	expect("  handlers ran", handled, wanted_handled);
}

int main(void)
{
	struct { struct kvm_signal_mask head; uint64_t set; } mask = { .head.len = 8 };
	sigset_t set, old, pending;
	pthread_t thread;

	GUEST(&m, NULL, 16 * PAGE, SPIN);
	handle(SIGALRM, note, 0);
	handle(SIGUSR1, note, SA_RESTART);
	handle(SIGUSR2, SIG_IGN, 0);
	alarm_in(20);
	spin("a handler without SA_RESTART", 1);
	handle(SIGALRM, note, SA_RESTART);
	alarm_in(20);
	spin("with SA_RESTART", 1);
	pthread_create(&thread, NULL, kick, (void *)pthread_self());
	spin("an ignored signal, then one with a handler", 1);
	pthread_join(thread, NULL);

	sigemptyset(&set), sigaddset(&set, SIGALRM);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	alarm_in(5);
	pthread_create(&thread, NULL, kick, (void *)pthread_self());
	spin("a blocked signal, then another", 1);
	pthread_join(thread, NULL);
	sigpending(&pending);
	expect("the blocked one is pending", sigismember(&pending, SIGALRM), 1);
	handled = 0;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	expect("  and delivered when unblocked", handled, 1);

	/* As VMMs do that block their kick signal outside KVM_RUN: nothing is blocked inside. */
	pthread_sigmask(SIG_BLOCK, &set, &old);
	expect("KVM_SET_SIGNAL_MASK", call(m.vcpu, KVM_SET_SIGNAL_MASK, &mask), 0);
	alarm_in(20);
	spin("a signal that only KVM_RUN lets through", 0);
	sigpending(&pending);
	expect("  is still pending outside", sigismember(&pending, SIGALRM), 1);
	spin("  and ends the next KVM_RUN at once", 0);
	expect("  sigtimedwait takes it", sigtimedwait(&set, NULL, &(struct timespec){ 0 }), SIGALRM);
	mask.head.len = 4;
	expect("a mask of 4 bytes", call(m.vcpu, KVM_SET_SIGNAL_MASK, &mask), -EINVAL);
	expect("no mask", call(m.vcpu, KVM_SET_SIGNAL_MASK, NULL), 0);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	m.run->immediate_exit = 1;
	m.run->exit_reason = 99;
	expect("immediate_exit", call(m.vcpu, KVM_RUN, 0), -EINTR);
	expect("  leaves the exit reason of", m.run->exit_reason, 99);
	m.run->immediate_exit = 0;
	alarm_in(20);
	spin("and on it goes", 1);
	return verdict();
}
