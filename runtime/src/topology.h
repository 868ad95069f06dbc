/* The cores that this process may use. */
#ifndef SPARSEC_TOPOLOGY_H
#define SPARSEC_TOPOLOGY_H

#include <stdint.h>

/* Physical cores with at least one CPU in the calling thread's affinity mask; at least 1. Limits
 * that a container sets as a share of time are not seen here. The first CPU of the mask on each of
 * the first `most` cores goes to `cpus`, -1 for a core that the system does not name. */
uint32_t sparsec_cores(int32_t *cpus, uint32_t most);

#endif
