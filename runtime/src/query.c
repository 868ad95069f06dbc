/* The library's only symbol: chooses among the targets that it is made for. */
#include <stddef.h>
#include <string.h>

#include "context.h"
#include "cpu_check.h"

__attribute__((visibility("default")))
const sparsec_model_v1 *sparsec_query(uint32_t abi_version) {
  if (abi_version != SPARSEC_ABI_VERSION) return NULL;
  const sparsec_model_v1 *const *table = sparsec_targets;
  const sparsec_model_v1 *const *last = table + sparsec_target_count - 1;
  while (table < last && sparsec_missing_feature(table[0]->required_isa)) table++;
  /* Of several that use the same instructions, the one for a machine like this. */
  while (table < last && !sparsec_is_machine_of(table[0]->target_isa) &&
         strcmp(table[0]->required_isa, table[1]->required_isa) == 0)
    table++;
  return *table;
}
