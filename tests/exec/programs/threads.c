/* Two vCPU threads, one of which never leaves its guest, while others make calls on the same VM; a signal ends the spin. */
#include "mini.h"

static struct machine m;
static struct kvm_run *spinner_run;
static int spinner;
static volatile int handled;

static void note(int signal)
{
	handled = signal;
}

static void *spin(void *nothing)
{
	return (void *)call(spinner, KVM_RUN, 0);
}

static void *ask(void *times)
{
	long good = 0;

	for (long i = 0; i < (long)times; i++)
		good += ioctl(m.kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1;
	return (void *)good;
}

static uint8_t wait_for_change(volatile uint8_t *at)
{
	uint8_t before = *at;

	for (int i = 0; i < 5000 && *at == before; i++)
		usleep(1000);
	return *at != before;
}

int main(void)
{
	struct sigaction action = { .sa_handler = note };
	pthread_t threads[5];
	void *result;
	int exits = 0;

	GUEST(&m, NULL, 16 * PAGE, OUT_FOR_EVER);
	memcpy(m.ram + 0x3000, SPIN, sizeof(SPIN));
	spinner = add_vcpu(&m, 1, &spinner_run);
	start_at(spinner, 0x3000);
	if (ioctl(m.vm, KVM_CHECK_EXTENSION, KVM_CAP_MP_STATE))
		must(ioctl(spinner, KVM_SET_MP_STATE, &(struct kvm_mp_state){ KVM_MP_STATE_RUNNABLE }), "KVM_SET_MP_STATE");
	sigaction(SIGUSR1, &action, NULL);
	pthread_create(&threads[0], NULL, spin, NULL);
	expect("the spinning guest counts", wait_for_change(m.ram + 0x2000), 1);
	for (int i = 1; i < 5; i++)
		pthread_create(&threads[i], NULL, ask, (void *)200);
	for (int i = 0; i < 200; i++)
		exits += run(&m) == KVM_EXIT_IO && io_byte(m.run) == 'X';
	expect("exits of the other vCPU", exits, 200);
	for (int i = 1; i < 5; i++) {
		pthread_join(threads[i], &result);
		expect("answers to a thread", (long)result, 200);
	}
	expect("it still counts", wait_for_change(m.ram + 0x2000), 1);
	expect("a region beside it", set_region(m.vm, 1, MIB, fresh_ram(MIB), MIB), 0);
	expect("it still counts", wait_for_change(m.ram + 0x2000), 1);
	spinner_run->immediate_exit = 1;
	pthread_kill(threads[0], SIGUSR1);
	pthread_join(threads[0], &result);
	expect("KVM_RUN of the spinner", (long)result, -EINTR);
	expect("its exit", spinner_run->exit_reason, KVM_EXIT_INTR);
	expect("the handler ran", handled, SIGUSR1);
	expect("run again with immediate_exit", call(spinner, KVM_RUN, 0), -EINTR);
	return verdict();
}
