"""The parts of model.c and targets.c that are the same for every model, as format strings."""

from __future__ import annotations

HEAD = """\
/* {name}: made by sparsec {version} for {isa}. Do not edit: compile the model again. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "context.h"
#include "cpu_check.h"

/* The {weights} constants, {nbytes} bytes. */
extern const unsigned char {symbol}[];

static inline void *weight(int64_t offset) {{ return (void *)(uintptr_t)({symbol} + offset); }}
static inline void *place(const sparsec_frame *f, int index) {{
  /* In a chain the place of a worker's own panels may begin before the arena. */
  return (void *)((uintptr_t)f->arena + (uintptr_t)f->places[index]);
}}
static inline void *input(const sparsec_frame *f, int index) {{
  return (void *)(uintptr_t)f->inputs[index];
}}
static inline void *output(const sparsec_frame *f, int index) {{ return f->outputs[index]; }}
"""

TAIL = """\
static const sparsec_code code;

static const char *missing_feature(void) {{ return sparsec_missing_feature({isa}); }}

static int32_t create(const sparsec_options_v1 *options, sparsec_context **context) {{
  return sparsec_context_create(&code, options, context);
}}

const sparsec_model_v1 {table} = {{
    .struct_bytes = sizeof(sparsec_model_v1),
    .abi_version = SPARSEC_ABI_VERSION,
    .name = {name},
    .description = description,
    .required_isa = {isa},
    .input_count = {inputs},
    .output_count = {outputs},
    .symbol_count = {symbols},
    .step_count = {steps},
    .inputs = inputs,
    .outputs = outputs,
    .symbols = symbol_names,
    .weights = {weights},
    .weights_bytes = {nbytes},
    .missing_feature = missing_feature,
    .status_text = sparsec_status_text,
    .context_create = create,
    .context_destroy = sparsec_context_destroy,
    .prepare = sparsec_prepare,
    .output_shape = sparsec_output_shape,
    .run = sparsec_run,
    .run_timed = sparsec_run_timed,
    .last_error = sparsec_last_error,
    .arena_bytes = sparsec_arena_bytes,
    .thread_count = sparsec_thread_count,
    .target = {target},
    .target_isa = {level},
    .targets = sparsec_targets,
    .target_count = {targets},
}};

static const sparsec_code code = {{
    .model = &{table},
    .dim_count = {dims},
    .place_count = {places},
    .slot_count = {slots},
    .chained_slot_count = {chained_slots},
    .chain_count = {chains},
    .step_count = {steps},
    .limit_count = {limits},
    .found_count = {found},
    .places = places,
    .chains = chains,
    .own_slots = own_slots,
    .steps = steps,
    .limits = limits,
    .magnitude = magnitude,
    .sizes = sizes,
    .found = found,
    .rework = rework,
}};
"""

TARGETS = """\
/* The targets that this library is made for, best first. */
#include "context.h"

extern const sparsec_model_v1 {tables};

const sparsec_model_v1 *const sparsec_targets[] = {{{addresses}}};
const uint32_t sparsec_target_count = {count};
"""
