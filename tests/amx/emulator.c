/* AMX on a CPU that has none: a handler of SIGILL that executes tile instructions.
 *
 * A CPU without AMX raises SIGILL at each of LDTILECFG, STTILECFG, TILERELEASE, TILELOADD(T1),
 * TILESTORED, TILEZERO, TDPB{SS,SU,US,UU}D and TDPBF16PS. The handler decodes the instruction where
 * the thread stopped, executes it on tiles that are variables of the thread, and lets the thread
 * go on behind it. What it does not know, and what a CPU with AMX would refuse as well (shapes that
 * do not fit, tiles that are not configured), it names on stderr and leaves to the handler from
 * before. Written from Intel's Software Developer's Manual, volumes 1 (chapter on AMX) and 2.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

typedef struct config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} config;
_Static_assert(sizeof(config) == 64, "as LDTILECFG reads it");

static __thread config shapes;
static __thread _Alignas(64) uint8_t tiles[TILES][ROWS][ROW_BYTES];
static struct sigaction before;
static uint64_t executed;

/* A VEX instruction of three bytes of prefix, map 0F38, W0 and L0. */
typedef struct instruction {
  int prefix; /* pp: 0 none, 1 66, 2 F3, 3 F2 */
  int opcode;
  int mod, reg, rm;
  int vvvv;
  int length;
  uint64_t address; /* of a memory operand */
  uint64_t stride;  /* of a sibmem operand */
  int has_sib;
} instruction;

static uint64_t register_of(const ucontext_t *context, int number) {
  static const int index[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
  return (uint64_t)context->uc_mcontext.gregs[index[number]];
}

static int64_t displacement(const uint8_t *p, int bytes) {
  if (bytes == 0) return 0;
  if (bytes == 1) return (int8_t)p[0];
  int32_t value;
  memcpy(&value, p, sizeof value);
  return value;
}

/* The operand in memory; p is behind the ModRM byte. */
static const uint8_t *decode_memory(const ucontext_t *context, const uint8_t *p, int x, int b,
                                    instruction *i) {
  int bytes = i->mod == 1 ? 1 : i->mod == 2 ? 4 : 0;
  i->has_sib = i->rm == 4;
  if (i->has_sib) {
    int sib = *p++;
    int index = (sib >> 3 & 7) | x << 3, base = (sib & 7) | b << 3;
    if (index != 4) i->stride = register_of(context, index) << (sib >> 6);
    if ((sib & 7) == 5 && i->mod == 0)
      bytes = 4;
    else
      i->address = register_of(context, base);
  } else if (i->mod == 0 && i->rm == 5) { /* relative to the next instruction */
    i->address = (uint64_t)(uintptr_t)(p + 4);
    bytes = 4;
  } else {
    i->address = register_of(context, i->rm | b << 3);
  }
  i->address += (uint64_t)displacement(p, bytes);
  return p + bytes;
}

static int decode(const ucontext_t *context, const uint8_t *start, instruction *i) {
  const uint8_t *p = start;
  memset(i, 0, sizeof *i);
  if (p[0] != 0xc4 || (p[1] & 0x1f) != 2 || (p[2] & 0x84) != 0) return 0;
  int r = !(p[1] >> 7 & 1), x = !(p[1] >> 6 & 1), b = !(p[1] >> 5 & 1);
  i->vvvv = ~(p[2] >> 3) & 15;
  i->prefix = p[2] & 3;
  i->opcode = p[3];
  i->mod = p[4] >> 6;
  i->reg = (p[4] >> 3 & 7) | r << 3;
  i->rm = p[4] & 7;
  p += 5;
  if (i->mod == 3)
    i->rm |= b << 3;
  else
    p = decode_memory(context, p, x, b, i);
  i->length = (int)(p - start);
  return 1;
}

static int is_configured(int tile) { return tile < TILES && shapes.palette && shapes.rows[tile]; }

static const char *load_config(const instruction *i) {
  config wanted;
  memcpy(&wanted, (const void *)(uintptr_t)i->address, sizeof wanted);
  if (wanted.palette == 0) {
    memset(&shapes, 0, sizeof shapes);
    memset(tiles, 0, sizeof tiles);
    return NULL;
  }
  if (wanted.palette != 1 || wanted.start_row) return "a palette that is not 1";
  for (int n = 0; n < 14; n++)
    if (wanted.reserved[n]) return "reserved bytes that are not zero";
  for (int t = 0; t < 16; t++) {
    if (t >= TILES && (wanted.rows[t] || wanted.row_bytes[t])) return "more than 8 tiles";
    if (wanted.rows[t] > ROWS || wanted.row_bytes[t] > ROW_BYTES) return "a tile too large";
    if (!wanted.rows[t] != !wanted.row_bytes[t]) return "a tile with rows or columns alone";
  }
  shapes = wanted;
  memset(tiles, 0, sizeof tiles);
  return NULL;
}

static const char *load_tile(const instruction *i) {
  if (!is_configured(i->reg)) return "a tile that is not configured";
  int rows = shapes.rows[i->reg], bytes = shapes.row_bytes[i->reg];
  memset(tiles[i->reg], 0, sizeof tiles[i->reg]);
  for (int row = 0; row < rows; row++)
    memcpy(tiles[i->reg][row], (const void *)(uintptr_t)(i->address + row * i->stride), bytes);
  return NULL;
}

static const char *store_tile(const instruction *i) {
  if (!is_configured(i->reg)) return "a tile that is not configured";
  int rows = shapes.rows[i->reg], bytes = shapes.row_bytes[i->reg];
  for (int row = 0; row < rows; row++)
    memcpy((void *)(uintptr_t)(i->address + row * i->stride), tiles[i->reg][row], bytes);
  return NULL;
}

static const char *zero_tile(const instruction *i) {
  if (!is_configured(i->reg)) return "a tile that is not configured";
  memset(tiles[i->reg], 0, sizeof tiles[i->reg]);
  return NULL;
}

static const char *misfit(int sum, int a, int b) {
  if (!is_configured(sum) || !is_configured(a) || !is_configured(b))
    return "a tile that is not configured";
  if (sum == a || sum == b || a == b) return "the same tile twice";
  if (shapes.row_bytes[sum] % 4 || shapes.row_bytes[a] % 4 || shapes.row_bytes[b] % 4)
    return "rows that are not whole quads";
  if (shapes.rows[sum] != shapes.rows[a]) return "sums and first factor of unequal rows";
  if (shapes.row_bytes[sum] != shapes.row_bytes[b])
    return "sums and second factor of unequal columns";
  if (shapes.row_bytes[a] != 4 * shapes.rows[b]) return "factors of unequal depth";
  return NULL;
}

__attribute__((target("avx2"))) static const char *dot_bytes(int sum, int a, int b, int a_signed,
                                                             int b_signed) {
  const char *reason = misfit(sum, a, b);
  if (reason) return reason;
  /* Rows and columns past the shapes hold zeros and stay zeros. */
  static __thread int32_t factors[ROWS][4][16];
  for (int q = 0; q < shapes.rows[b]; q++)
    for (int e = 0; e < 4; e++)
      for (int c = 0; c < 16; c++) {
        uint8_t byte = tiles[b][q][4 * c + e];
        factors[q][e][c] = b_signed ? (int8_t)byte : byte;
      }
  for (int r = 0; r < shapes.rows[sum]; r++) {
    uint32_t total[16];
    memcpy(total, tiles[sum][r], sizeof total);
    for (int q = 0; q < shapes.rows[b]; q++)
      for (int e = 0; e < 4; e++) {
        uint8_t byte = tiles[a][r][4 * q + e];
        int32_t factor = a_signed ? (int8_t)byte : byte;
        for (int c = 0; c < 16; c++) total[c] += (uint32_t)(factor * factors[q][e][c]);
      }
    memcpy(tiles[sum][r], total, sizeof total);
  }
  return NULL;
}

static float flushed(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
}

static float from_bf16(const uint8_t *p) {
  uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
  float x;
  memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

__attribute__((target("fma"))) static const char *dot_bf16(int sum, int a, int b) {
  const char *reason = misfit(sum, a, b);
  if (reason) return reason;
  for (int r = 0; r < shapes.rows[sum]; r++)
    for (int c = 0; c < shapes.row_bytes[sum] / 4; c++) {
      float parts[2] = {0, 0}, total;
      for (int q = 0; q < shapes.rows[b]; q++)
        for (int e = 0; e < 2; e++) {
          float x = from_bf16(&tiles[a][r][4 * q + 2 * e]);
          float y = from_bf16(&tiles[b][q][4 * c + 2 * e]);
          parts[e] = flushed(__builtin_fmaf(x, y, parts[e]));
        }
      memcpy(&total, &tiles[sum][r][4 * c], sizeof total);
      total = flushed(flushed(total) + flushed(parts[0] + parts[1]));
      memcpy(&tiles[sum][r][4 * c], &total, sizeof total);
    }
  return NULL;
}

static const char unknown[] = "an instruction that is not AMX's";

static const char *execute_49(const instruction *i) {
  int is_memory = i->mod != 3 && i->reg == 0;
  if (i->vvvv) return unknown;
  if (is_memory && i->prefix == 0) return load_config(i);
  if (is_memory && i->prefix == 1) {
    memcpy((void *)(uintptr_t)i->address, &shapes, sizeof shapes);
    return NULL;
  }
  if (i->mod != 3 || i->rm != 0) return unknown;
  if (i->prefix == 3) return zero_tile(i);
  if (i->prefix != 0 || i->reg != 0) return unknown;
  memset(&shapes, 0, sizeof shapes);
  memset(tiles, 0, sizeof tiles);
  return NULL;
}

static const char *execute(const instruction *i) {
  int registers = i->mod == 3;
  if (i->opcode == 0x49) return execute_49(i);
  if (i->opcode == 0x4b && i->has_sib && !i->vvvv) {
    if (i->prefix == 1 || i->prefix == 3) return load_tile(i);
    if (i->prefix == 2) return store_tile(i);
  }
  if (i->opcode == 0x5e && registers) { /* pp: UU, US, SU, SS */
    int a_signed = i->prefix >= 2, b_signed = i->prefix & 1;
    return dot_bytes(i->reg, i->rm, i->vvvv, a_signed, b_signed);
  }
  if (i->opcode == 0x5c && registers && i->prefix == 2) return dot_bf16(i->reg, i->rm, i->vvvv);
  return unknown;
}

static void say(const char *text) {
  if (write(2, text, strlen(text)) < 0) return;
}

static void handle(int signal, siginfo_t *info, void *opaque) {
  (void)info;
  ucontext_t *context = opaque;
  greg_t *next = &context->uc_mcontext.gregs[REG_RIP];
  instruction i;
  const char *reason = unknown;
  if (decode(context, (const uint8_t *)(uintptr_t)*next, &i)) reason = execute(&i);
  if (!reason) {
    *next += i.length;
    __atomic_fetch_add(&executed, 1, __ATOMIC_RELAXED);
    return;
  }
  say("AMX emulator: ");
  say(reason);
  say("\n");
  sigaction(signal, &before, NULL); /* and the instruction runs once more */
}

/* Execute tile instructions from now on, in all threads that do not block SIGILL. */
int amx_emulator_install(void) {
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
  struct sigaction old;
  if (sigaction(SIGILL, &action, &old) != 0) return -1;
  if (old.sa_sigaction != handle) before = old;
  return 0;
}

/* How many instructions were executed so far. */
uint64_t amx_emulator_executed(void) { return __atomic_load_n(&executed, __ATOMIC_RELAXED); }
