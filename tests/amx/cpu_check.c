/* Takes the place of runtime/src/cpu_check.c in libraries that tests run over the emulator. */
#include "cpu_check.h"

#include <stddef.h>

const char *sparsec_missing_feature(const char *isa) {
  (void)isa;
  return NULL;
}

int sparsec_is_machine_of(const char *isa) {
  (void)isa;
  return 1;
}
