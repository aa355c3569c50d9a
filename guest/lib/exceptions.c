/*
 * What happens on an exception: never nothing.
 *
 * 1. vectors.S brings every vector here as a struct frame.
 * 2. #VC of an SEV-ES guest is an instruction to be done with the host's help
 *    (vc.c), which may turn out as another exception.
 * 3. NMIs are counted where the program wants them (nmis), and it goes on where it was.
 * 4. If the program armed a recovery for this very vector (EXPECT_EXCEPTION),
 *    what was seen is noted and the program resumes after its instructions.
 * 5. Otherwise one line tells the vector, error code, RIP (and CR2 for #PF), and
 *    the guest ends with EXIT_EXCEPTION.
 * 6. An exception while saying so ends the guest at once: no loop, no triple fault.
 */
#include "ghcb.h"

#define VECTOR_NMI	2
#define VECTOR_VC	29

void exception(struct frame *frame);

struct recovery recovery;
volatile struct nmis nmis;

static const char *const names[32] = {
	"#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM",
	"#DF", "vector 9", "#TS", "#NP", "#SS", "#GP", "#PF", "vector 15",
	"#MF", "#AC", "#MC", "#XM", "#VE", "#CP", "vector 22", "vector 23",
	"vector 24", "vector 25", "vector 26", "vector 27", "#HV", "#VC", "#SX", "vector 31",
};

void exception(struct frame *frame)
{
	static int reporting;
	uint64_t cr2 = read_cr2();

	if (frame->vector == VECTOR_VC && vc_handle(frame))
		return;
	if (frame->vector == VECTOR_NMI && nmis.wanted) {
		nmis.count++;
		ghcb_nmi_done();
		return;
	}
	if (recovery.resume && frame->vector == recovery.vector) {
		recovery.caught = (struct caught){ frame->vector, frame->error, frame->rip, cr2, recovery.resume };
		recovery.taken = true;
		frame->rip = recovery.resume;
		recovery.resume = 0;
		return;
	}
	if (__atomic_fetch_add(&reporting, 1, __ATOMIC_RELAXED))
		guest_exit(EXIT_EXCEPTION);
	ghcb_abandon();
	console_force_unlock();
	print("guest exception: vector %lu (%s) error 0x%lx rip 0x%lx",
	      frame->vector, names[frame->vector & 31], frame->error, frame->rip);
	if (frame->vector == 14)
		print(" cr2 0x%lx", cr2);
	print("\n");
	guest_exit(EXIT_EXCEPTION);
}

/* Ends the expectation, taken or not; true if the exception came. */
bool recovery_disarm(struct caught *caught)
{
	recovery.resume = 0;
	*caught = recovery.caught;
	return recovery.taken;
}
