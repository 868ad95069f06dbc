/* The C interface of a compiled model.
 *
 * A model.so exports one symbol, `sparsec_query`. It returns a table that describes the model and
 * holds the functions that run it:
 *
 *   const sparsec_model_v1 *model = query(SPARSEC_ABI_VERSION);
 *   sparsec_context *context;
 *   model->context_create(NULL, &context);              one per thread that runs the model
 *   model->prepare(context, shapes);                    shapes[i][axis]: sizes of input i
 *   model->output_shape(context, 0, shape);             so that the caller can allocate
 *   model->run(context, inputs, outputs);               as often as wanted for these shapes
 *   model->context_destroy(context);
 *
 * A model is immutable. Contexts are independent of each other and may run at the same time; one
 * context serves one thread at a time and answers SPARSEC_BUSY to a second one. Only
 * context_create and prepare allocate; `run` neither allocates nor prints, and nothing here exits
 * the process. Arrays are dense and row-major. All functions that can fail return a sparsec_status.
 *
 * A context with threads of its own does not survive fork(): in the child `run` answers
 * SPARSEC_FORKED (its threads exist in the parent only); create a new one there. Destroying it in
 * the child is safe.
 */
#ifndef SPARSEC_H
#define SPARSEC_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPARSEC_ABI_VERSION 1u
#define SPARSEC_MAX_RANK 8u

typedef enum sparsec_status {
  SPARSEC_OK = 0,
  SPARSEC_INDEX_OUT_OF_RANGE = 1, /* a token id or other index is outside its table */
  SPARSEC_INVALID_ARGUMENT = 2,   /* null pointer, unknown option, index of no such output */
  SPARSEC_INVALID_SHAPE = 3,      /* an input size is below 1 or contradicts another one */
  SPARSEC_TOO_LARGE = 4,          /* the sizes need more memory than can be addressed */
  SPARSEC_OUT_OF_MEMORY = 5,
  SPARSEC_UNSUPPORTED_CPU = 6,    /* see missing_feature */
  SPARSEC_BUSY = 7,               /* another thread uses this context now */
  SPARSEC_NOT_PREPARED = 8,       /* run or output_shape before a prepare that succeeded */
  SPARSEC_THREAD_FAILED = 9,      /* a worker thread could not be started or pinned */
  SPARSEC_FORKED = 10             /* the context's threads were started before a fork() */
} sparsec_status;

typedef enum sparsec_dtype {
  SPARSEC_BOOL = 1, /* one byte, 0 or 1 */
  SPARSEC_I8 = 2,
  SPARSEC_U8 = 3,
  SPARSEC_I16 = 4,
  SPARSEC_U16 = 5,
  SPARSEC_I32 = 6,
  SPARSEC_U32 = 7,
  SPARSEC_I64 = 8,
  SPARSEC_U64 = 9,
  SPARSEC_F16 = 10,
  SPARSEC_F32 = 11,
  SPARSEC_F64 = 12
} sparsec_dtype;

/* One axis of an input or output. */
typedef struct sparsec_dim_v1 {
  int64_t size;     /* -1 when it depends on the input shapes */
  int32_t symbol;   /* index into `symbols` when the size is just that symbol, else -1 */
  uint32_t reserved;
  const char *text; /* "384", "batch", "2*seq + 1" */
} sparsec_dim_v1;

typedef struct sparsec_tensor_v1 {
  const char *name;
  uint32_t dtype; /* sparsec_dtype */
  uint32_t rank;
  const sparsec_dim_v1 *dims; /* `rank` of them */
} sparsec_tensor_v1;

typedef struct sparsec_context sparsec_context;

/* One task of a parallel loop. */
typedef int32_t (*sparsec_task)(void *argument, uint32_t index);

/* Runs task(argument, i) for all i in [0, tasks), on any threads, and returns when all are done:
 * 0, or a status that a task returned. Must not return before the last task has ended. */
typedef int32_t (*sparsec_parallel_for)(void *user, uint32_t tasks, sparsec_task task,
                                        void *argument);

typedef enum sparsec_pin {
  SPARSEC_PIN_NONE = 0,
  SPARSEC_PIN_CORES = 1, /* worker i on core i of the process's affinity mask */
  SPARSEC_PIN_LIST = 2   /* worker i on cpus[i] */
} sparsec_pin;

/* How a context computes. Zero everywhere but struct_bytes means: the defaults. */
typedef struct sparsec_options_v1 {
  uint32_t struct_bytes; /* sizeof(sparsec_options_v1) */
  uint32_t threads;      /* with the caller's; 0: one per core of the affinity mask */
  uint32_t pin;          /* sparsec_pin; the calling thread (worker 0) is never moved */
  uint32_t cpu_count;    /* of `cpus`; at least `threads` for SPARSEC_PIN_LIST */
  const int32_t *cpus;   /* read by context_create only */
  /* How long a worker spins between runs before it sleeps; 0: 50 microseconds. Within a run it is
   * 2 milliseconds at least. */
  uint32_t spin_us;
  uint32_t no_spin; /* 1: sleep at once, within a run too */
  sparsec_parallel_for parallel_for; /* not null: used instead of own threads */
  void *parallel_user;               /* its first argument */
  uint64_t reserved[4];              /* zero */
} sparsec_options_v1;

typedef struct sparsec_model_v1 {
  uint32_t struct_bytes; /* sizeof(sparsec_model_v1) of the library */
  uint32_t abi_version;  /* SPARSEC_ABI_VERSION of the library */
  const char *name;
  const char *description;  /* JSON, UTF-8: ports, kernel calls, memory, versions */
  /* "avx2", "avx512", "avx512vnni", "avx512vbmi2", "avx512bf16" or "amx" */
  const char *required_isa;
  uint32_t input_count;
  uint32_t output_count;
  uint32_t symbol_count;
  uint32_t step_count; /* kernel calls of one run */
  const sparsec_tensor_v1 *inputs;
  const sparsec_tensor_v1 *outputs;
  const char *const *symbols; /* names of the sizes that input shapes bind */
  const void *weights;        /* mapped from the file, read-only */
  uint64_t weights_bytes;

  /* The first CPU or system feature that the model needs and this machine lacks; NULL: none. */
  const char *(*missing_feature)(void);

  /* A text in English for a status; never NULL. */
  const char *(*status_text)(int32_t status);

  /* `options` may be NULL. On failure *context is NULL. */
  int32_t (*context_create)(const sparsec_options_v1 *options, sparsec_context **context);
  void (*context_destroy)(sparsec_context *context); /* NULL is allowed */

  /* Binds the symbols, checks that shapes agree, sizes the memory. Needed before the first run and
   * whenever a shape changes. shapes[i] has `rank` sizes; it may be NULL for rank 0. */
  int32_t (*prepare)(sparsec_context *context, const int64_t *const *shapes);

  /* Writes an output's `rank` sizes for the prepared shapes; `shape` may be NULL for rank 0. */
  int32_t (*output_shape)(sparsec_context *context, uint32_t index, int64_t *shape);

  /* Inputs and outputs in the order of the tables, in the prepared shapes, aligned to their
   * element type. An output must not overlap an input or another output. After a failure the
   * contents of the outputs are undefined. */
  int32_t (*run)(sparsec_context *context, const void *const *inputs, void *const *outputs);

  /* `run`, and the wall time of each step in nanoseconds: step_ns has step_count elements, in the
   * order of "steps" in the description. Of steps that several workers do for some tokens at a time
   * ("chains") it is what the calling thread took for its share. */
  int32_t (*run_timed)(sparsec_context *context, const void *const *inputs, void *const *outputs,
                       uint64_t *step_ns);

  /* What went wrong in the last call on this context that failed: which input and axis, what was
   * wanted and what came. Valid until the next call; "" when nothing failed yet. */
  const char *(*last_error)(sparsec_context *context);

  /* Bytes of working memory that the context holds now. */
  uint64_t (*arena_bytes)(sparsec_context *context);

  /* Threads that the context computes on, the caller's included. */
  uint32_t (*thread_count)(sparsec_context *context);

  /* From here on only where struct_bytes says so: libraries of before have 176 bytes. */

  const char *target;     /* the machine that this table's code is made for: "icelake-server" */
  const char *target_isa; /* the best level of that machine; its kernels may need less */

  /* All tables of the library, one per target that it is made for, best first. They agree in
   * inputs, outputs, symbols and weights. Any of them without a missing_feature can be used. */
  const struct sparsec_model_v1 *const *targets;
  uint32_t target_count;
  uint32_t reserved;
} sparsec_model_v1;

/* The table of the first target whose required_isa this machine has; of several with the same one,
 * of the first whose target_isa it has. Where it has none of them, the last table: see its
 * missing_feature. NULL when the library does not speak `abi_version`. */
const sparsec_model_v1 *sparsec_query(uint32_t abi_version);

/* The layout is the same for every compiler on x86-64 Linux. */
#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
_Static_assert(sizeof(sparsec_dim_v1) == 24, "sparsec_dim_v1");
_Static_assert(sizeof(sparsec_tensor_v1) == 24, "sparsec_tensor_v1");
_Static_assert(sizeof(sparsec_options_v1) == 80, "sparsec_options_v1");
_Static_assert(sizeof(sparsec_model_v1) == 208, "sparsec_model_v1");
#endif

#ifdef __cplusplus
}
#endif

#endif
