/* Chains: neighbouring steps that a worker takes some token panels through before it goes on to the
 * next panels. What one step wrote is then in the worker's L2 when the next one reads it, and no
 * worker waits for another in between. */
#ifndef SPARSEC_CHAIN_H
#define SPARSEC_CHAIN_H

#include <stddef.h>
#include <stdint.h>

#include "context.h"

#define CACHE_LINE 64

/* Places of a worker: whole cache lines of them, since it rewrites some at each step. */
static inline size_t sparsec_chain_places(uint32_t place_count) {
  size_t line = CACHE_LINE / sizeof(int64_t);
  return (place_count + line - 1) / line * line;
}

/* One chain in one run. */
typedef struct sparsec_chain_run {
  const sparsec_code *code;
  const sparsec_chain *chain;
  const sparsec_frame *frame;
  const int64_t *items; /* per step */
  int64_t block;        /* panels at a time */
  int64_t *places;      /* memory for sparsec_chain_places numbers of each worker */
  uint64_t *step_ns;    /* what worker 0 takes for each step is added; may be a null pointer */
} sparsec_chain_run;

/* How many panels a worker should take at a time; 0: the steps are better done one by one. */
int64_t sparsec_chain_block(const sparsec_chain *chain, int64_t panels, int64_t threads);

/* Takes the panels [begin, end) through the chain. Returns the first status that is not 0. */
int32_t sparsec_chain_work(const sparsec_chain_run *run, uint32_t worker, void *scratch,
                           int64_t begin, int64_t end);

#endif
