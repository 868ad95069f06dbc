/* The cores that this process may use. */
#ifndef SPARSEC_TOPOLOGY_H
#define SPARSEC_TOPOLOGY_H

#include <stdint.h>

/* Physical cores with at least one CPU in the calling thread's affinity mask; at least 1. Limits
 * that a container sets as a share of time are not seen here. */
uint32_t sparsec_core_count(void);

/* The first CPU of the mask on core `index`; -1 when there are not that many cores. */
int sparsec_core(uint32_t index);

#endif
