/* Calls kernels whose parameters are only known at run time, and times them in turns. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "parallel.h"

#define INTEGERS 40 /* parameters that are not floats, with scratch, begin and end */
#define FLOATS 8
#define LINE 64

/* The x86-64 calling convention passes integers and pointers in order, and apart from them up to
 * eight floats in order: however they are mixed in its prototype, a kernel finds its arguments. It
 * reads no more than it has. */
typedef int32_t (*kernel)(
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    float, float, float, float, float, float, float, float);

typedef struct call {
  kernel function;
  int64_t integers[INTEGERS]; /* `count` of them are set: not scratch, begin and end */
  int64_t count;
  float floats[FLOATS];
  unsigned char *scratch; /* of all workers, or null when the kernel takes none */
  int64_t scratch_bytes;  /* of one worker */
  int64_t items;
  int64_t grain;
} call;

typedef struct candidate {
  const call *calls;
  int64_t count;
} candidate;

typedef struct memory {
  const unsigned char *bytes;
  int64_t count;
} memory;

static int32_t run_range(void *argument, uint32_t worker, int64_t begin, int64_t end) {
  const call *c = argument;
  int64_t i[INTEGERS];
  const float *f = c->floats;
  int64_t n = c->count;
  memcpy(i, c->integers, sizeof i);
  if (c->scratch) i[n++] = (int64_t)(uintptr_t)(c->scratch + worker * c->scratch_bytes);
  i[n++] = begin;
  i[n++] = end;
  return c->function(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11],
                     i[12], i[13], i[14], i[15], i[16], i[17], i[18], i[19], i[20], i[21], i[22],
                     i[23], i[24], i[25], i[26], i[27], i[28], i[29], i[30], i[31], i[32], i[33],
                     i[34], i[35], i[36], i[37], i[38], i[39], f[0], f[1], f[2], f[3], f[4], f[5],
                     f[6], f[7]);
}

static int32_t run_calls(sparsec_pool *pool, const candidate *c) {
  for (int64_t i = 0; i < c->count; i++) {
    const call *next = &c->calls[i];
    if (next->items <= 0) continue;
    int32_t status = sparsec_pool_run(pool, next->items, next->grain, run_range, (void *)next);
    if (status) return status;
  }
  return 0;
}

/* One read per cache line; the sum keeps the reads. */
static int32_t read_lines(const memory *m) {
  unsigned sum = 0;
  for (int64_t i = 0; i < m->count; i += LINE) sum += ((const volatile unsigned char *)m->bytes)[i];
  return sum == UINT32_MAX;
}

static int32_t read_range(void *argument, uint32_t worker, int64_t begin, int64_t end) {
  (void)worker, (void)begin, (void)end;
  return read_lines(argument) * 0;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Runs the candidates in turns, `repeats` times each. `cold` is read by every worker before each
 * timed run, so that weights come from where a model's come from, then `warm` by the caller: what
 * the kernel before has just written. `seconds` is [repeats][count]; null: no time is taken.
 * Returns the first status that is not 0. */
__attribute__((visibility("default"))) int32_t run_candidates(
    uint32_t threads, const candidate *candidates, int64_t count, int64_t repeats,
    const memory *cold, const memory *warm, int64_t warm_count, double *seconds) {
  sparsec_options_v1 options = {.struct_bytes = sizeof options, .threads = threads};
  sparsec_pool *pool;
  int32_t status = sparsec_pool_create(&options, &pool);
  for (int64_t r = 0; r < repeats && !status; r++) {
    for (int64_t turn = 0; turn < count && !status; turn++) {
      int64_t i = r % 2 ? count - 1 - turn : turn; /* none is always first */
      if (seconds) sparsec_pool_run(pool, threads, 1, read_range, (void *)cold);
      for (int64_t w = 0; w < warm_count; w++) read_lines(&warm[w]);
      double start = now();
      status = run_calls(pool, &candidates[i]);
      if (seconds) seconds[r * count + i] = now() - start;
    }
  }
  sparsec_pool_destroy(pool);
  return status;
}
