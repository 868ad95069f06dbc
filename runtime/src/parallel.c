#define _GNU_SOURCE /* CPU_SET, pthread_attr_setaffinity_np, syscall */
#include "parallel.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <xmmintrin.h>

#include "topology.h"

#define DEFAULT_SPIN_US 50
#define STACK_BYTES (1 << 20) /* kernels keep less than 64 KB on the stack */
#define PAUSES_PER_LOOK 32    /* between looks at the clock: about 1 to 3 microseconds */
#define RUN_SPIN_NS 2000000   /* a thread that waits for a step of a run spins as long */
#define QUIT UINT32_MAX

/* A counter that one thread raises and one thread waits for. */
typedef struct signal_word {
  _Atomic uint32_t value;
  _Atomic uint32_t sleeping; /* the waiting thread is in, or about to enter, futex_wait */
} signal_word;

/* The caller writes what to do, then raises `start`; the worker writes the status, then raises
 * `done`. Each side has one cache line of its own: a step moves two lines per worker. */
typedef struct worker {
  _Alignas(64) signal_word start;
  sparsec_range range;
  void *argument;
  int64_t begin, end;
  _Alignas(64) signal_word done;
  int32_t status;
  _Alignas(64) sparsec_pool *pool;
  uint32_t index;
  pthread_t thread;
} worker;

struct sparsec_pool {
  sparsec_options_v1 options;
  uint32_t threads;
  uint32_t started; /* workers that exist; workers[0] is the caller and never one of them */
  pid_t pid;
  int64_t spin_ns;
  _Atomic int is_running; /* between the first and the last step of a run */
  worker *workers;
};

int64_t sparsec_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void futex(_Atomic uint32_t *word, int operation, uint32_t value) {
  syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

static void raise_to(signal_word *word, uint32_t value) {
  /* Both accesses are seq_cst, here and in wait_beyond: either the waiter sees the new value before
   * it sleeps, or this thread sees that it sleeps. */
  atomic_store(&word->value, value);
  if (atomic_load(&word->sleeping)) futex(&word->value, FUTEX_WAKE_PRIVATE, INT_MAX);
}

/* How long a thread of the pool spins now before it sleeps. Within a run it is long: the kernel of
 * a guest may take an idle CPU that the host has taken back for busy, wake a thread on the CPU of
 * the one that wakes it, and leave both there for tens of milliseconds, at half the speed. */
static int64_t spin_ns(const sparsec_pool *pool) {
  int is_running = atomic_load_explicit(&pool->is_running, memory_order_relaxed);
  return is_running && pool->spin_ns < RUN_SPIN_NS ? RUN_SPIN_NS : pool->spin_ns;
}

/* Returns the first value that differs from `seen`: spins, then sleeps. */
static uint32_t wait_beyond(const sparsec_pool *pool, signal_word *word, uint32_t seen) {
  uint32_t value;
  int64_t start = pool->spin_ns ? sparsec_now_ns() : 0;
  do {
    for (int i = 0; i < PAUSES_PER_LOOK; i++) {
      value = atomic_load_explicit(&word->value, memory_order_acquire);
      if (value != seen) return value;
      _mm_pause();
    }
    sched_yield(); /* a thread that wants this core may be the one that is waited for */
  } while (pool->spin_ns && sparsec_now_ns() - start < spin_ns(pool));

  atomic_store(&word->sleeping, 1);
  while ((value = atomic_load(&word->value)) == seen)
    futex(&word->value, FUTEX_WAIT_PRIVATE, seen);
  atomic_store(&word->sleeping, 0);
  return value;
}

static void *work(void *argument) {
  worker *self = argument;
  sparsec_pool *pool = self->pool;
  for (uint32_t seen = 0;;) {
    seen = wait_beyond(pool, &self->start, seen);
    if (seen == QUIT) return NULL;
    self->status = self->range(self->argument, self->index, self->begin, self->end);
    raise_to(&self->done, seen);
  }
}

static int start_worker(sparsec_pool *pool, uint32_t index, const cpu_set_t *place) {
  worker *w = &pool->workers[index];
  w->pool = pool;
  w->index = index;
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return -1;
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  int failed = place && pthread_attr_setaffinity_np(&attributes, sizeof *place, place) != 0;
  failed = failed || pthread_create(&w->thread, &attributes, work, w) != 0;
  pthread_attr_destroy(&attributes);
  return failed ? -1 : 0;
}

/* The affinity of a worker that has `cpu` for itself. */
static int place_on(int32_t cpu, cpu_set_t *place) {
  if (cpu < 0 || cpu >= CPU_SETSIZE) return -1;
  CPU_ZERO(place);
  CPU_SET(cpu, place);
  return 0;
}

static int start_workers(sparsec_pool *pool) {
  /* Signals are for the threads of the program that uses the model; all but those that an
   * instruction or a system call raises: their handlers run where it is, and the process ends
   * where they are blocked. */
  static const int faults[] = {SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
  sigset_t most, before;
  sigfillset(&most);
  for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) sigdelset(&most, faults[i]);
  int32_t cores[CPU_SETSIZE];
  const int32_t *cpus = pool->options.cpus;
  uint32_t count = pool->threads; /* SPARSEC_PIN_LIST has as many, or more */
  if (pool->options.pin == SPARSEC_PIN_CORES) {
    cpus = cores;
    count = sparsec_cores(cores, CPU_SETSIZE);
  }
  pthread_sigmask(SIG_SETMASK, &most, &before);
  int failed = 0;
  for (uint32_t i = 1; i < pool->threads && !failed; i++) {
    cpu_set_t place;
    int pinned = pool->options.pin != SPARSEC_PIN_NONE;
    failed = (pinned && (i >= count || place_on(cpus[i], &place) != 0)) ||
             start_worker(pool, i, pinned ? &place : NULL) != 0;
    if (!failed) pool->started = i;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return failed ? -1 : 0;
}

int32_t sparsec_pool_create(const sparsec_options_v1 *options, sparsec_pool **result) {
  *result = NULL;
  uint32_t threads = options->threads ? options->threads : sparsec_cores(NULL, 0);
  void *workers;
  sparsec_pool *pool = calloc(1, sizeof *pool);
  if (!pool) return SPARSEC_OUT_OF_MEMORY;
  if (posix_memalign(&workers, 64, threads * sizeof(worker)) != 0) {
    free(pool);
    return SPARSEC_OUT_OF_MEMORY;
  }
  memset(workers, 0, threads * sizeof(worker));
  pool->workers = workers;
  pool->options = *options;
  pool->threads = threads;
  pool->pid = getpid();
  if (!options->no_spin)
    pool->spin_ns = 1000 * (int64_t)(options->spin_us ? options->spin_us : DEFAULT_SPIN_US);
  if (!options->parallel_for && start_workers(pool) != 0) {
    sparsec_pool_destroy(pool);
    return SPARSEC_THREAD_FAILED;
  }
  pool->options.cpus = NULL; /* the caller's memory */
  *result = pool;
  return SPARSEC_OK;
}

void sparsec_pool_destroy(sparsec_pool *pool) {
  if (!pool) return;
  if (!sparsec_pool_forked(pool)) {
    for (uint32_t i = 1; i <= pool->started; i++) raise_to(&pool->workers[i].start, QUIT);
    for (uint32_t i = 1; i <= pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
  }
  free(pool->workers);
  free(pool);
}

uint32_t sparsec_pool_threads(const sparsec_pool *pool) { return pool->threads; }

int sparsec_pool_forked(const sparsec_pool *pool) {
  return pool->started && pool->pid != getpid();
}

void sparsec_pool_begin(sparsec_pool *pool) {
  atomic_store_explicit(&pool->is_running, 1, memory_order_relaxed);
}

void sparsec_pool_end(sparsec_pool *pool) {
  atomic_store_explicit(&pool->is_running, 0, memory_order_relaxed);
}

static void set_ranges(sparsec_pool *pool, uint32_t count, int64_t items, sparsec_range range,
                       void *argument) {
  int64_t each = items / count, more = items % count, begin = 0;
  for (uint32_t i = 0; i < count; i++) {
    worker *w = &pool->workers[i];
    w->range = range;
    w->argument = argument;
    w->begin = begin;
    begin += each + (i < more);
    w->end = begin;
    w->status = SPARSEC_OK;
  }
}

static int32_t run_hooked(void *argument, uint32_t index) {
  sparsec_pool *pool = argument;
  worker *w = &pool->workers[index];
  w->status = w->range(w->argument, index, w->begin, w->end);
  return w->status;
}

static int32_t run_own(sparsec_pool *pool, uint32_t count) {
  worker *workers = pool->workers;
  for (uint32_t i = 1; i < count; i++) {
    uint32_t next = atomic_load_explicit(&workers[i].start.value, memory_order_relaxed) + 1;
    raise_to(&workers[i].start, next == QUIT ? 0 : next);
  }
  run_hooked(pool, 0);
  for (uint32_t i = 1; i < count; i++) {
    uint32_t wanted = atomic_load_explicit(&workers[i].start.value, memory_order_relaxed);
    for (uint32_t seen = atomic_load(&workers[i].done.value); seen != wanted;)
      seen = wait_beyond(pool, &workers[i].done, seen);
  }
  return SPARSEC_OK;
}

int32_t sparsec_pool_run(sparsec_pool *pool, int64_t items, int64_t grain, sparsec_range range,
                         void *argument) {
  int64_t parts = items / (grain > 0 ? grain : 1);
  uint32_t count = parts < 1 ? 1 : parts < pool->threads ? (uint32_t)parts : pool->threads;
  if (count == 1) return range(argument, 0, 0, items);

  set_ranges(pool, count, items, range, argument);
  int32_t status = pool->options.parallel_for
                       ? pool->options.parallel_for(pool->options.parallel_user, count, run_hooked,
                                                    pool)
                       : run_own(pool, count);
  for (uint32_t i = 0; i < count; i++)
    if (pool->workers[i].status != SPARSEC_OK) return pool->workers[i].status;
  return status;
}
