#include "chain.h"

#include <string.h>

#include "parallel.h"

int64_t sparsec_chain_block(const sparsec_chain *chain, int64_t panels, int64_t threads) {
  if (threads == 1) return panels > chain->block ? chain->block : 0;
  /* Whole panels may share out badly, items of single steps do not: a loss of 1/8 is worth it. */
  int64_t most = (panels + threads - 1) / threads;
  if (panels < threads || most * threads * 8 > panels * 9) return 0;
  return sparsec_min(panels / threads, chain->block);
}

/* A step for the panels [first, last). A value that the worker has for itself begins at its part
 * of the slot with panel `first`, so the place of panel 0 may lie outside the slot. */
static int32_t do_step(const sparsec_chain_run *run, uint32_t index, uint32_t worker,
                       const sparsec_frame *frame, int64_t *places, void *scratch, int64_t first,
                       int64_t last) {
  const sparsec_step *step = &run->code->steps[index];
  int64_t begin = first * step->per_panel;
  int64_t end = sparsec_min(last * step->per_panel, run->items[index]);
  if (begin >= end) return SPARSEC_OK;
  for (uint32_t i = 0; i < step->own_count; i++) {
    const sparsec_own *own = &step->own[i];
    int64_t most = run->code->own_slots[run->code->places[own->place].chained_slot];
    places[own->place] += worker * run->block * most - first * own->panel_bytes;
  }
  int32_t status = step->run(frame, scratch, begin, end);
  for (uint32_t i = 0; i < step->own_count; i++)
    places[step->own[i].place] = run->frame->places[step->own[i].place];
  return status;
}

int32_t sparsec_chain_work(const sparsec_chain_run *run, uint32_t worker, void *scratch,
                           int64_t begin, int64_t end) {
  uint32_t count = run->code->place_count;
  int64_t *places = run->places + worker * sparsec_chain_places(count);
  memcpy(places, run->frame->places, count * sizeof *places);
  sparsec_frame frame = *run->frame;
  frame.places = places;
  uint64_t *step_ns = worker == 0 ? run->step_ns : NULL;
  for (int64_t first = begin; first < end; first += run->block) {
    int64_t last = sparsec_min(first + run->block, end);
    for (uint32_t i = run->chain->first; i <= run->chain->last; i++) {
      int64_t start = step_ns ? sparsec_now_ns() : 0;
      int32_t status = do_step(run, i, worker, &frame, places, scratch, first, last);
      if (status != SPARSEC_OK) return status;
      if (step_ns) step_ns[i] += (uint64_t)(sparsec_now_ns() - start);
    }
  }
  return SPARSEC_OK;
}
