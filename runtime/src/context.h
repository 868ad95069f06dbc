/* What model.c hands to the runtime, and the functions that its table of functions points to. */
#ifndef SPARSEC_CONTEXT_H
#define SPARSEC_CONTEXT_H

#include <stdint.h>

#include "sparsec.h"

/* What a step of model.c sees of one run. */
typedef struct sparsec_frame {
  const int64_t *symbols; /* values of the model's symbols, then of those found by steps */
  unsigned char *arena;
  const int64_t *places; /* byte offsets in the arena */
  const void *const *inputs;
  void *const *outputs;
} sparsec_frame;

/* One kernel call on the items [begin, end). `scratch` belongs to the calling worker. */
typedef int32_t (*sparsec_step_function)(const sparsec_frame *frame, void *scratch, int64_t begin,
                                         int64_t end);

/* A place of which a worker in a chain has a part for itself, for one block of panels. */
typedef struct sparsec_own {
  uint32_t place;
  int64_t panel_bytes; /* of the value that the step has there */
} sparsec_own;

typedef struct sparsec_step {
  sparsec_step_function run;
  const char *text;       /* for error messages */
  int64_t per_panel;      /* items of a panel; 0: the step is in no chain */
  const sparsec_own *own; /* of its places, when the chain is made use of */
  uint32_t own_count;
} sparsec_step;

/* Steps that a worker may do for `block` panels at a time; see chain.h. */
typedef struct sparsec_chain {
  uint32_t first, last;
  int64_t block;
} sparsec_chain;

/* Where a place lies: its slot, and that of a run that makes use of chains. */
typedef struct sparsec_place {
  uint32_t slot, chained_slot;
} sparsec_place;

/* A value that must not be larger than `most`, or the model has no meaning. */
typedef struct sparsec_limit {
  int64_t most;
  const char *text;   /* of the value: "seq" */
  const char *reason; /* where the limit comes from */
} sparsec_limit;

/* A step that finds the value of a symbol: it leaves an int64 at the start of `place`. */
typedef struct sparsec_found {
  uint32_t step;
  uint32_t symbol; /* one of those after the model's */
  uint32_t place;
} sparsec_found;

/* All that depends on the symbols, with the most that those found by steps can be. */
typedef struct sparsec_sizes {
  int64_t *dims;          /* of all inputs, then of all outputs, axis by axis */
  int64_t *slot_bytes;    /* per slot */
  int64_t *chained_slot_bytes; /* but of those that own_slots has */
  int64_t *panels;        /* per chain */
  int64_t *items;         /* per step; 0: another step computes the same for these symbols */
  int64_t *grain;         /* per step: the least number of items worth a worker of its own */
  int64_t *scratch_bytes; /* per step, for each worker */
  int64_t *limits;        /* the value of each limit */
} sparsec_sizes;

typedef struct sparsec_code {
  const sparsec_model_v1 *model;
  uint32_t dim_count;
  uint32_t place_count;
  uint32_t slot_count;
  uint32_t chained_slot_count;
  uint32_t chain_count;
  uint32_t step_count;
  uint32_t limit_count;
  uint32_t found_count; /* symbols beyond the model's */
  const sparsec_place *places;
  const sparsec_chain *chains; /* in the order of their steps */
  const int64_t *own_slots; /* per chained slot: bytes of a panel that a worker has for itself */
  const sparsec_step *steps;
  const sparsec_limit *limits;
  /* An upper bound of the absolute value of everything that `sizes` computes on the way. */
  double (*magnitude)(const double *symbols);
  void (*sizes)(const int64_t *symbols, const sparsec_sizes *sizes);
  const sparsec_found *found; /* in the order of their steps */
  /* Writes items and grain of the steps, and panels of the chains, whose work depends on symbols
   * that steps find. */
  void (*rework)(const int64_t *symbols, const sparsec_sizes *sizes);
} sparsec_code;

/* The tables of all targets, best first: in targets.c, which is made beside each model. */
extern const sparsec_model_v1 *const sparsec_targets[];
extern const uint32_t sparsec_target_count;

/* See sparsec.h for what these do. */
const char *sparsec_status_text(int32_t status);
int32_t sparsec_context_create(const sparsec_code *code, const sparsec_options_v1 *options,
                               sparsec_context **context);
void sparsec_context_destroy(sparsec_context *context);
int32_t sparsec_prepare(sparsec_context *context, const int64_t *const *shapes);
int32_t sparsec_output_shape(sparsec_context *context, uint32_t index, int64_t *shape);
int32_t sparsec_run(sparsec_context *context, const void *const *inputs, void *const *outputs);
int32_t sparsec_run_timed(sparsec_context *context, const void *const *inputs,
                          void *const *outputs, uint64_t *step_ns);
const char *sparsec_last_error(sparsec_context *context);
uint64_t sparsec_arena_bytes(sparsec_context *context);
uint32_t sparsec_thread_count(sparsec_context *context);

/* Used by expressions in model.c. */
static inline int64_t sparsec_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t sparsec_min(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
