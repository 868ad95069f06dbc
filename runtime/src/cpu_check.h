/* Whether this machine can run kernels of an instruction-set level. */
#ifndef SPARSEC_CPU_CHECK_H
#define SPARSEC_CPU_CHECK_H

/* The first feature of level `isa` that the CPU or the system lacks; NULL when there is none. A
 * level that is not known is lacking as a whole. For "amx" this asks the kernel for permission to
 * use tile registers, which then holds for the whole process: it is for code that needs `isa`. */
const char *sparsec_missing_feature(const char *isa);

/* Whether the machine is one of level `isa`, for code that needs less. It asks for no permission;
 * that to use tile registers might still be refused. */
int sparsec_is_machine_of(const char *isa);

#endif
