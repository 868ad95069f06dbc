#define _GNU_SOURCE /* syscall */
#include "cpu_check.h"

#include <cpuid.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux arch/x86/include/uapi/asm/prctl.h */
#define GET_SUPPORTED 0x1021      /* ARCH_GET_XCOMP_SUPP */
#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18              /* XFEATURE_XTILE_DATA */

/* Bits of XCR0: which register files the operating system saves. */
#define XCR0_AVX 0x6u
#define XCR0_AVX512 0xe6u
#define XCR0_AMX 0x60000u

enum { LEAF_1_ECX, LEAF_7_EBX, LEAF_7_ECX, LEAF_7_EDX, LEAF_7_1_EAX, EXTENDED_1_ECX, WORDS };

typedef struct feature {
  const char *name;
  int word;
  int bit;
  uint32_t xcr0;
} feature;

/* Weakest first: a level needs all features up to its last one. */
static const feature features[] = {
    {"AVX", LEAF_1_ECX, 28, XCR0_AVX},
    {"F16C", LEAF_1_ECX, 29, XCR0_AVX},
    {"FMA", LEAF_1_ECX, 12, XCR0_AVX},
    {"MOVBE", LEAF_1_ECX, 22, 0},
    {"POPCNT", LEAF_1_ECX, 23, 0},
    {"LZCNT", EXTENDED_1_ECX, 5, 0},
    {"BMI1", LEAF_7_EBX, 3, 0},
    {"BMI2", LEAF_7_EBX, 8, 0},
    {"AVX2", LEAF_7_EBX, 5, XCR0_AVX},
    {"AVX-512F", LEAF_7_EBX, 16, XCR0_AVX512},
    {"AVX-512DQ", LEAF_7_EBX, 17, XCR0_AVX512},
    {"AVX-512BW", LEAF_7_EBX, 30, XCR0_AVX512},
    {"AVX-512VL", LEAF_7_EBX, 31, XCR0_AVX512},
    {"AVX-512 VNNI", LEAF_7_ECX, 11, XCR0_AVX512},
    {"AVX-512 VBMI", LEAF_7_ECX, 1, XCR0_AVX512},
    {"AVX-512 VBMI2", LEAF_7_ECX, 6, XCR0_AVX512},
    {"AVX-512 BF16", LEAF_7_1_EAX, 5, XCR0_AVX512},
    {"AMX-TILE", LEAF_7_EDX, 24, XCR0_AMX},
    {"AMX-INT8", LEAF_7_EDX, 25, XCR0_AMX},
    {"AMX-BF16", LEAF_7_EDX, 22, XCR0_AMX},
};

typedef struct level {
  const char *isa;
  size_t features;
} level;

static const level levels[] = {
    {"avx2", 9},         {"avx512", 13},     {"avx512vnni", 14},
    {"avx512vbmi2", 16}, {"avx512bf16", 17}, {"amx", 20}};

static uint32_t read_xcr0(uint32_t leaf_1_ecx) {
  if (!(leaf_1_ecx >> 27 & 1)) return 0; /* OSXSAVE: xgetbv may be used */
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

static const char *missing_of(size_t count) {
  uint32_t words[WORDS] = {0};
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d)) words[LEAF_1_ECX] = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    words[LEAF_7_EBX] = b;
    words[LEAF_7_ECX] = c;
    words[LEAF_7_EDX] = d;
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) words[LEAF_7_1_EAX] = a;
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) words[EXTENDED_1_ECX] = c;
  uint32_t xcr0 = read_xcr0(words[LEAF_1_ECX]);
  for (size_t i = 0; i < count; i++) {
    const feature *f = &features[i];
    if (!(words[f->word] >> f->bit & 1)) return f->name;
    if ((xcr0 & f->xcr0) != f->xcr0) return f->name;
  }
  return NULL;
}

static const char *missing_in_cpu(const char *isa) {
  for (size_t i = 0; i < sizeof levels / sizeof levels[0]; i++)
    if (strcmp(isa, levels[i].isa) == 0) return missing_of(levels[i].features);
  return isa;
}

const char *sparsec_missing_feature(const char *isa) {
  const char *missing = missing_in_cpu(isa);
  if (missing || strcmp(isa, "amx") != 0) return missing;
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0) return NULL;
  return "permission to use AMX (Linux 5.16 or newer)";
}

int sparsec_is_machine_of(const char *isa) {
  if (missing_in_cpu(isa)) return 0;
  if (strcmp(isa, "amx") != 0) return 1;
  uint64_t supported = 0;
  return syscall(SYS_arch_prctl, GET_SUPPORTED, &supported) == 0 && supported >> TILE_DATA & 1;
}
