#define _GNU_SOURCE /* sched_getaffinity */
#include "topology.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* The lowest CPU that shares a core with `cpu`; `cpu` itself when the system does not say. */
static int first_sibling(int cpu) {
  char path[96], text[16] = {0};
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return cpu;
  ssize_t got = read(file, text, sizeof text - 1); /* "3,67" or "6-7" */
  close(file);
  return got > 0 ? (int)strtol(text, NULL, 10) : cpu;
}

uint32_t sparsec_cores(int32_t *cpus, uint32_t most) {
  cpu_set_t mask, taken;
  CPU_ZERO(&mask);
  CPU_ZERO(&taken); /* cores, by their first sibling */
  uint32_t count = 0;
  int known = sched_getaffinity(0, sizeof mask, &mask) == 0;
  for (int cpu = 0; known && cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    int core = first_sibling(cpu);
    if (core < 0 || core >= CPU_SETSIZE) core = cpu;
    if (CPU_ISSET(core, &taken)) continue;
    CPU_SET(core, &taken);
    if (count < most) cpus[count] = cpu;
    count++;
  }
  if (count) return count;
  if (most) cpus[0] = -1;
  return 1;
}
