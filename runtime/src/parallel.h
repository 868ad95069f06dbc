/* A pool of threads that belongs to one context. */
#ifndef SPARSEC_PARALLEL_H
#define SPARSEC_PARALLEL_H

#include <stdint.h>

#include "sparsec.h"

typedef struct sparsec_pool sparsec_pool;

/* Works on the items [begin, end); `worker` is in [0, threads) and no two calls that run at the
 * same time share it. Returns 0 or a status. */
typedef int32_t (*sparsec_range)(void *argument, uint32_t worker, int64_t begin, int64_t end);

/* `options` is complete and checked. Starts threads - 1 workers unless parallel_for is given. */
int32_t sparsec_pool_create(const sparsec_options_v1 *options, sparsec_pool **pool);

/* Ends and joins the workers; in a child of fork() it only frees the memory. */
void sparsec_pool_destroy(sparsec_pool *pool);

uint32_t sparsec_pool_threads(const sparsec_pool *pool);

/* Whether the process is another one than the one that created the pool, and workers are gone. */
int sparsec_pool_forked(const sparsec_pool *pool);

/* Around the calls of sparsec_pool_run that follow each other at once: between them threads stay
 * awake for longer. */
void sparsec_pool_begin(sparsec_pool *pool);
void sparsec_pool_end(sparsec_pool *pool);

/* Splits [0, items) into one contiguous range per worker, of at least `grain` items each, runs them
 * at the same time and waits for all. Returns the first status that is not 0, in worker order, so
 * that it does not depend on timing. */
int32_t sparsec_pool_run(sparsec_pool *pool, int64_t items, int64_t grain, sparsec_range range,
                         void *argument);

/* Nanoseconds of a clock that only goes forward. */
int64_t sparsec_now_ns(void);

#endif
