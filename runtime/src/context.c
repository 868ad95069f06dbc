#define _GNU_SOURCE /* madvise */
#include "context.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xmmintrin.h>

#include "chain.h"
#include "cpu_check.h"
#include "parallel.h"

#define ALIGNMENT 64
#define HUGE_PAGE (INT64_C(2) << 20)
#define MAX_MAGNITUDE 4.0e18              /* below 2^62: no sum or product has wrapped around */
#define MAX_ARENA (INT64_C(1) << 46)      /* user address space of x86-64 is 2^47 bytes */
#define MAX_THREADS 1024
#define DEFAULT_MXCSR 0x1f80u             /* round to nearest, denormals kept, no traps */
#define MXCSR_FLAGS 0x3fu                 /* sticky exception flags */

struct sparsec_context {
  const sparsec_code *code;
  sparsec_pool *pool;
  atomic_flag busy;
  int prepared;
  unsigned char *arena;
  int64_t arena_bytes;
  int64_t scratch_offset; /* of worker 0 in the arena */
  int64_t scratch_stride; /* between workers */
  int64_t *symbols;
  int64_t *places;        /* byte offsets in the arena */
  int64_t *slots;         /* those of the slots, chained or not */
  int64_t *worker_places; /* of each worker in a chain */
  int64_t own_panels;     /* that own slots hold; 0 where no chain is made use of */
  sparsec_sizes sizes;
  char error[512];
};

/* One step or one chain of one run, as the pool's workers see it. */
typedef struct job {
  const sparsec_context *context;
  const sparsec_frame *frame;
  const sparsec_step *step;
  const sparsec_chain_run *chain; /* a null pointer for a step */
} job;

const char *sparsec_status_text(int32_t status) {
  switch (status) {
    case SPARSEC_OK: return "ok";
    case SPARSEC_INDEX_OUT_OF_RANGE:
      return "an index is out of range: a token id, or a position past its table";
    case SPARSEC_INVALID_ARGUMENT: return "invalid argument";
    case SPARSEC_INVALID_SHAPE: return "invalid shape";
    case SPARSEC_TOO_LARGE: return "the sizes need more memory than can be addressed";
    case SPARSEC_OUT_OF_MEMORY: return "out of memory";
    case SPARSEC_UNSUPPORTED_CPU: return "the CPU lacks an instruction set";
    case SPARSEC_BUSY: return "the context is in use by another thread";
    case SPARSEC_NOT_PREPARED: return "the context is not prepared";
    case SPARSEC_THREAD_FAILED: return "a worker thread could not be started or pinned";
    case SPARSEC_FORKED: return "the context was created before a fork";
    default: return "unknown status";
  }
}

static int32_t fail(sparsec_context *context, int32_t status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(context->error, sizeof context->error, format, arguments);
  va_end(arguments);
  return status;
}

/* creation */

static int options_are_valid(const sparsec_options_v1 *o) {
  for (size_t i = 0; i < sizeof o->reserved / sizeof o->reserved[0]; i++)
    if (o->reserved[i]) return 0;
  if (o->threads > MAX_THREADS || o->pin > SPARSEC_PIN_LIST || o->no_spin > 1) return 0;
  if (o->pin != SPARSEC_PIN_LIST) return 1;
  return o->cpus && o->threads && o->cpu_count >= o->threads;
}

static int64_t *take(int64_t **memory, uint32_t count) {
  int64_t *start = *memory;
  *memory += count;
  return start;
}

static sparsec_context *allocate(const sparsec_code *code) {
  size_t symbols = (size_t)code->model->symbol_count + code->found_count;
  uint32_t most_slots = code->slot_count > code->chained_slot_count ? code->slot_count
                                                                    : code->chained_slot_count;
  size_t numbers = symbols + code->dim_count + code->place_count + most_slots +
                   code->slot_count + code->chained_slot_count + code->chain_count +
                   3 * (size_t)code->step_count + code->limit_count;
  sparsec_context *context = calloc(1, sizeof *context + numbers * sizeof(int64_t));
  if (!context) return NULL;
  int64_t *memory = (int64_t *)(context + 1);
  context->code = code;
  atomic_flag_clear(&context->busy);
  context->symbols = take(&memory, (uint32_t)symbols);
  context->places = take(&memory, code->place_count);
  context->slots = take(&memory, most_slots);
  context->sizes.dims = take(&memory, code->dim_count);
  context->sizes.slot_bytes = take(&memory, code->slot_count);
  context->sizes.chained_slot_bytes = take(&memory, code->chained_slot_count);
  context->sizes.panels = take(&memory, code->chain_count);
  context->sizes.items = take(&memory, code->step_count);
  context->sizes.grain = take(&memory, code->step_count);
  context->sizes.scratch_bytes = take(&memory, code->step_count);
  context->sizes.limits = take(&memory, code->limit_count);
  return context;
}

static int32_t allocate_worker_places(sparsec_context *context) {
  size_t each = sparsec_chain_places(context->code->place_count) * sizeof(int64_t);
  void *memory;
  if (posix_memalign(&memory, CACHE_LINE, each * sparsec_pool_threads(context->pool)) != 0)
    return SPARSEC_OUT_OF_MEMORY;
  context->worker_places = memory;
  return SPARSEC_OK;
}

int32_t sparsec_context_create(const sparsec_code *code, const sparsec_options_v1 *options,
                               sparsec_context **result) {
  static const sparsec_options_v1 defaults = {.struct_bytes = sizeof(sparsec_options_v1)};
  if (!result) return SPARSEC_INVALID_ARGUMENT;
  *result = NULL;
  if (!options) options = &defaults;
  if (options->struct_bytes != sizeof *options || !options_are_valid(options))
    return SPARSEC_INVALID_ARGUMENT;
  if (sparsec_missing_feature(code->model->required_isa)) return SPARSEC_UNSUPPORTED_CPU;

  sparsec_context *context = allocate(code);
  if (!context) return SPARSEC_OUT_OF_MEMORY;
  int32_t status = sparsec_pool_create(options, &context->pool);
  if (status == SPARSEC_OK && code->chain_count) status = allocate_worker_places(context);
  if (status != SPARSEC_OK) {
    sparsec_context_destroy(context);
    return status;
  }
  *result = context;
  return SPARSEC_OK;
}

void sparsec_context_destroy(sparsec_context *context) {
  if (!context) return;
  sparsec_pool_destroy(context->pool);
  free(context->arena);
  free(context->worker_places);
  free(context);
}

/* preparation */

/* Gives every symbol the size of the first axis that is just this symbol. */
static int32_t bind_symbols(sparsec_context *context, const int64_t *const *shapes) {
  const sparsec_model_v1 *model = context->code->model;
  for (uint32_t s = 0; s < model->symbol_count; s++) context->symbols[s] = 0;
  for (uint32_t i = 0; i < model->input_count; i++) {
    const sparsec_tensor_v1 *input = &model->inputs[i];
    if (input->rank && !shapes[i])
      return fail(context, SPARSEC_INVALID_ARGUMENT, "input \"%s\": its shape is a null pointer",
                  input->name);
    for (uint32_t axis = 0; axis < input->rank; axis++) {
      int64_t size = shapes[i][axis];
      if (size < 1)
        return fail(context, SPARSEC_INVALID_SHAPE,
                    "input \"%s\", axis %" PRIu32 ": wanted a size of at least 1, got %" PRId64,
                    input->name, axis, size);
      int32_t symbol = input->dims[axis].symbol;
      if (symbol >= 0 && !context->symbols[symbol]) context->symbols[symbol] = size;
    }
  }
  return SPARSEC_OK;
}

static int32_t check_magnitude(sparsec_context *context) {
  const sparsec_model_v1 *model = context->code->model;
  double symbols[model->symbol_count ? model->symbol_count : 1];
  for (uint32_t s = 0; s < model->symbol_count; s++) symbols[s] = (double)context->symbols[s];
  if (context->code->magnitude(symbols) < MAX_MAGNITUDE) return SPARSEC_OK;
  return fail(context, SPARSEC_TOO_LARGE, "the input shapes are too large: sizes exceed 2^62");
}

static int32_t check_shapes(sparsec_context *context, const int64_t *const *shapes) {
  const sparsec_model_v1 *model = context->code->model;
  const int64_t *wanted = context->sizes.dims;
  for (uint32_t i = 0; i < model->input_count; i++) {
    const sparsec_tensor_v1 *input = &model->inputs[i];
    for (uint32_t axis = 0; axis < input->rank; axis++, wanted++) {
      if (shapes[i][axis] == *wanted) continue;
      const char *text = input->dims[axis].symbol < 0 && input->dims[axis].size >= 0
                             ? "fixed"
                             : input->dims[axis].text;
      return fail(context, SPARSEC_INVALID_SHAPE,
                  "input \"%s\", axis %" PRIu32 ": wanted %" PRId64 " (%s), got %" PRId64,
                  input->name, axis, *wanted, text, shapes[i][axis]);
    }
  }
  for (uint32_t i = 0; i < model->output_count; i++) {
    const sparsec_tensor_v1 *output = &model->outputs[i];
    for (uint32_t axis = 0; axis < output->rank; axis++, wanted++)
      if (*wanted < 0)
        return fail(context, SPARSEC_INVALID_SHAPE,
                    "output \"%s\", axis %" PRIu32 ": %s would be %" PRId64
                    " for these input shapes",
                    output->name, axis, output->dims[axis].text, *wanted);
  }
  return SPARSEC_OK;
}

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* How many panels a worker takes through a chain at a time; 0: its steps are done one by one. */
static int64_t block_of(const sparsec_context *context, uint32_t chain) {
  int64_t panels = context->sizes.panels[chain], threads = sparsec_pool_threads(context->pool);
  int64_t block = sparsec_chain_block(&context->code->chains[chain], panels, threads);
  /* Step by step all panels would have to be there. */
  if (block == 0 && panels <= context->own_panels) return 0;
  int64_t room = context->own_panels / threads;
  return block == 0 || block > room ? room : block;
}

/* What own slots have to hold for the panels that there are at most. */
static int64_t count_own_panels(const sparsec_context *context) {
  int64_t threads = sparsec_pool_threads(context->pool), most = 0;
  for (uint32_t i = 0; i < context->code->chain_count; i++)
    most = sparsec_max(most, sparsec_chain_block(&context->code->chains[i],
                                                 context->sizes.panels[i], threads));
  return most * threads;
}

/* Lays out slots and the workers' scratch; returns all bytes, or -1 when they are too many. */
static int64_t lay_out(sparsec_context *context) {
  const sparsec_code *code = context->code;
  int64_t own_panels = context->own_panels = count_own_panels(context);
  uint32_t slots = own_panels ? code->chained_slot_count : code->slot_count;
  int64_t total = 0, scratch = 0;
  for (uint32_t i = 0; i < slots; i++) {
    int64_t bytes =
        own_panels ? context->sizes.chained_slot_bytes[i] + own_panels * code->own_slots[i]
                   : context->sizes.slot_bytes[i];
    if (bytes < 0 || bytes > MAX_ARENA || total > MAX_ARENA) return -1;
    context->slots[i] = total;
    total += aligned(bytes);
  }
  for (uint32_t i = 0; i < code->place_count; i++) {
    const sparsec_place *place = &code->places[i];
    context->places[i] = context->slots[own_panels ? place->chained_slot : place->slot];
  }
  for (uint32_t i = 0; i < code->step_count; i++)
    scratch = sparsec_max(scratch, context->sizes.scratch_bytes[i]);
  if (scratch > MAX_ARENA / MAX_THREADS) return -1;
  context->scratch_offset = total;
  context->scratch_stride = aligned(scratch);
  total += context->scratch_stride * sparsec_pool_threads(context->pool);
  return total <= MAX_ARENA ? total : -1;
}

static int32_t check_limits(sparsec_context *context) {
  for (uint32_t i = 0; i < context->code->limit_count; i++) {
    const sparsec_limit *limit = &context->code->limits[i];
    if (context->sizes.limits[i] > limit->most)
      return fail(context, SPARSEC_INVALID_SHAPE,
                  "%s is %" PRId64 " for these input shapes; it can be at most %" PRId64 ": %s",
                  limit->text, context->sizes.limits[i], limit->most, limit->reason);
  }
  return SPARSEC_OK;
}

static int32_t grow_arena(sparsec_context *context, int64_t bytes) {
  if (bytes <= context->arena_bytes) return SPARSEC_OK;
  free(context->arena);
  context->arena = NULL;
  context->arena_bytes = 0;
  int64_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
  int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void *memory;
  if (posix_memalign(&memory, (size_t)alignment, (size_t)rounded) != 0)
    return fail(context, SPARSEC_OUT_OF_MEMORY, "no memory for an arena of %" PRId64 " bytes",
                rounded);
  if (alignment == HUGE_PAGE) madvise(memory, (size_t)rounded, MADV_HUGEPAGE);
  context->arena = memory;
  context->arena_bytes = rounded;
  return SPARSEC_OK;
}

static int32_t prepare(sparsec_context *context, const int64_t *const *shapes) {
  context->prepared = 0;
  if (!shapes && context->code->model->input_count)
    return fail(context, SPARSEC_INVALID_ARGUMENT, "shapes is a null pointer");
  int32_t status = bind_symbols(context, shapes);
  if (status == SPARSEC_OK) status = check_magnitude(context);
  if (status != SPARSEC_OK) return status;

  context->code->sizes(context->symbols, &context->sizes);
  status = check_shapes(context, shapes);
  if (status == SPARSEC_OK) status = check_limits(context);
  if (status != SPARSEC_OK) return status;

  int64_t bytes = lay_out(context);
  if (bytes < 0)
    return fail(context, SPARSEC_TOO_LARGE,
                "the input shapes need an arena of more than 2^46 bytes");
  status = grow_arena(context, bytes);
  if (status != SPARSEC_OK) return status;
  context->prepared = 1;
  return SPARSEC_OK;
}

/* SPARSEC_OK means that this thread has the context until it clears `busy`. The message of the
 * thread that has it stays untouched. */
static int32_t enter(sparsec_context *context) {
  if (!context) return SPARSEC_INVALID_ARGUMENT;
  if (atomic_flag_test_and_set_explicit(&context->busy, memory_order_acquire)) return SPARSEC_BUSY;
  return SPARSEC_OK;
}

static int32_t leave(sparsec_context *context, int32_t status) {
  atomic_flag_clear_explicit(&context->busy, memory_order_release);
  return status;
}

int32_t sparsec_prepare(sparsec_context *context, const int64_t *const *shapes) {
  int32_t status = enter(context);
  return status == SPARSEC_OK ? leave(context, prepare(context, shapes)) : status;
}

static int32_t output_shape(sparsec_context *context, uint32_t index, int64_t *shape) {
  const sparsec_model_v1 *model = context->code->model;
  if (!context->prepared)
    return fail(context, SPARSEC_NOT_PREPARED, "output_shape comes after prepare");
  if (index >= model->output_count)
    return fail(context, SPARSEC_INVALID_ARGUMENT,
                "there are %" PRIu32 " outputs, no output %" PRIu32, model->output_count, index);
  const int64_t *dims = context->sizes.dims;
  for (uint32_t i = 0; i < model->input_count; i++) dims += model->inputs[i].rank;
  for (uint32_t i = 0; i < index; i++) dims += model->outputs[i].rank;
  if (!model->outputs[index].rank) return SPARSEC_OK;
  if (!shape) return fail(context, SPARSEC_INVALID_ARGUMENT, "shape is a null pointer");
  memcpy(shape, dims, model->outputs[index].rank * sizeof *shape);
  return SPARSEC_OK;
}

int32_t sparsec_output_shape(sparsec_context *context, uint32_t index, int64_t *shape) {
  int32_t status = enter(context);
  return status == SPARSEC_OK ? leave(context, output_shape(context, index, shape)) : status;
}

/* running */

static int32_t run_range(void *argument, uint32_t worker, int64_t begin, int64_t end) {
  const job *j = argument;
  const sparsec_context *context = j->context;
  unsigned char *scratch =
      context->arena + context->scratch_offset + worker * context->scratch_stride;
  /* The caller may flush denormals or round otherwise; all workers must compute the same. */
  unsigned before = _mm_getcsr();
  int foreign = (before & ~MXCSR_FLAGS) != DEFAULT_MXCSR;
  if (foreign) _mm_setcsr(DEFAULT_MXCSR);
  int32_t status = j->chain ? sparsec_chain_work(j->chain, worker, scratch, begin, end)
                            : j->step->run(j->frame, scratch, begin, end);
  if (foreign) _mm_setcsr(before);
  return status;
}

static int32_t check_pointers(sparsec_context *context, const void *const *inputs,
                              void *const *outputs) {
  const sparsec_model_v1 *model = context->code->model;
  for (uint32_t i = 0; i < model->input_count; i++)
    if (!inputs || !inputs[i])
      return fail(context, SPARSEC_INVALID_ARGUMENT, "input \"%s\" is a null pointer",
                  model->inputs[i].name);
  for (uint32_t i = 0; i < model->output_count; i++)
    if (!outputs || !outputs[i])
      return fail(context, SPARSEC_INVALID_ARGUMENT, "output \"%s\" is a null pointer",
                  model->outputs[i].name);
  return SPARSEC_OK;
}

/* The size that a step found decides which later steps work, and how much. */
static void bind_found(sparsec_context *context, const sparsec_found *found) {
  const void *place = context->arena + context->places[found->place];
  memcpy(&context->symbols[found->symbol], place, sizeof(int64_t));
  context->code->rework(context->symbols, &context->sizes);
}

/* One step; `found` is what it finds, or a null pointer. */
static int32_t run_step(sparsec_context *context, const sparsec_frame *frame, uint32_t index,
                        const sparsec_found *found) {
  const sparsec_step *step = &context->code->steps[index];
  int64_t items = context->sizes.items[index];
  job j = {context, frame, step, NULL};
  int32_t status = SPARSEC_OK;
  if (items > 0)
    status = sparsec_pool_run(context->pool, items, context->sizes.grain[index], run_range, &j);
  if (status != SPARSEC_OK)
    return fail(context, status, "step %" PRIu32 " (%s): %s", index, step->text,
                sparsec_status_text(status));
  if (found) bind_found(context, found);
  return SPARSEC_OK;
}

/* All steps of a chain, `block` panels at a time. */
static int32_t run_chain(sparsec_context *context, const sparsec_frame *frame, uint32_t index,
                         int64_t block, uint64_t *step_ns) {
  const sparsec_code *code = context->code;
  const sparsec_chain *chain = &code->chains[index];
  const sparsec_chain_run run = {
      code, chain, frame, context->sizes.items, block, context->worker_places, step_ns};
  job j = {context, frame, NULL, &run};
  int64_t panels = context->sizes.panels[index];
  int32_t status = sparsec_pool_run(context->pool, panels, 1, run_range, &j);
  if (status == SPARSEC_OK) return SPARSEC_OK;
  return fail(context, status, "steps %" PRIu32 " to %" PRIu32 " (%s and so on): %s", chain->first,
              chain->last, code->steps[chain->first].text, sparsec_status_text(status));
}

/* step_ns is a null pointer when nobody asks for the times. */
static int32_t run_all(sparsec_context *context, const sparsec_frame *frame, uint64_t *step_ns) {
  const sparsec_code *code = context->code;
  const sparsec_found *found = code->found, *no_more = code->found + code->found_count;
  for (uint32_t i = 0, chain = 0; i < code->step_count; i++) {
    int64_t start = step_ns ? sparsec_now_ns() : 0;
    int64_t block = 0;
    int32_t status;
    if (chain < code->chain_count && code->chains[chain].first == i)
      block = context->own_panels ? block_of(context, chain++) : 0;
    if (block) {
      status = run_chain(context, frame, chain - 1, block, step_ns);
      i = code->chains[chain - 1].last;
    } else {
      int finds = found < no_more && found->step == i;
      status = run_step(context, frame, i, finds ? found++ : NULL);
      if (step_ns) step_ns[i] = (uint64_t)(sparsec_now_ns() - start);
    }
    if (status != SPARSEC_OK) return status;
  }
  return SPARSEC_OK;
}

static int32_t run(sparsec_context *context, const void *const *inputs, void *const *outputs,
                   uint64_t *step_ns) {
  const sparsec_code *code = context->code;
  if (!context->prepared) return fail(context, SPARSEC_NOT_PREPARED, "run comes after prepare");
  if (sparsec_pool_forked(context->pool))
    return fail(context, SPARSEC_FORKED,
                "the threads of this context stayed in the parent process; create a new context");
  int32_t status = check_pointers(context, inputs, outputs);
  if (status != SPARSEC_OK) return status;

  const sparsec_frame frame = {context->symbols, context->arena, context->places, inputs, outputs};
  if (step_ns) memset(step_ns, 0, code->step_count * sizeof *step_ns);
  sparsec_pool_begin(context->pool);
  status = run_all(context, &frame, step_ns);
  sparsec_pool_end(context->pool);
  return status;
}

int32_t sparsec_run(sparsec_context *context, const void *const *inputs, void *const *outputs) {
  int32_t status = enter(context);
  return status == SPARSEC_OK ? leave(context, run(context, inputs, outputs, NULL)) : status;
}

int32_t sparsec_run_timed(sparsec_context *context, const void *const *inputs,
                          void *const *outputs, uint64_t *step_ns) {
  int32_t status = enter(context);
  return status == SPARSEC_OK ? leave(context, run(context, inputs, outputs, step_ns)) : status;
}

const char *sparsec_last_error(sparsec_context *context) {
  return context ? context->error : "the context is a null pointer";
}

uint64_t sparsec_arena_bytes(sparsec_context *context) {
  return context ? (uint64_t)context->arena_bytes : 0;
}

uint32_t sparsec_thread_count(sparsec_context *context) {
  return context ? sparsec_pool_threads(context->pool) : 0;
}
