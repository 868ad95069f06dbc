/* Runs a compiled model from C: nothing is needed but sparsec.h and the library itself.
 *
 *   cc -I runtime/include examples/run_from_c/main.c -ldl -o run_from_c
 *   ./run_from_c model.so [batch] [sequence length]
 */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparsec.h"

#define MAX_PORTS 32

typedef const sparsec_model_v1 *(*query_function)(uint32_t abi_version);

static size_t element_bytes(uint32_t dtype) {
  switch (dtype) {
    case SPARSEC_I16: case SPARSEC_U16: case SPARSEC_F16: return 2;
    case SPARSEC_I32: case SPARSEC_U32: case SPARSEC_F32: return 4;
    case SPARSEC_I64: case SPARSEC_U64: case SPARSEC_F64: return 8;
    default: return 1;
  }
}

static int64_t product(const int64_t *shape, uint32_t rank) {
  int64_t count = 1;
  for (uint32_t axis = 0; axis < rank; axis++) count *= shape[axis];
  return count;
}

/* Made-up values: small token ids, a mask of ones, zeros as token types. */
static void fill(const sparsec_tensor_v1 *input, void *data, int64_t count) {
  int ids = strstr(input->name, "ids") != NULL && strstr(input->name, "type") == NULL;
  int mask = strstr(input->name, "mask") != NULL;
  for (int64_t i = 0; i < count; i++) {
    int64_t value = ids ? 1 + i % 20 : mask;
    switch (input->dtype) {
      case SPARSEC_I64: case SPARSEC_U64: ((int64_t *)data)[i] = value; break;
      case SPARSEC_I32: case SPARSEC_U32: ((int32_t *)data)[i] = (int32_t)value; break;
      case SPARSEC_F32: ((float *)data)[i] = mask ? 1.0f : 0.01f * (float)(i % 100); break;
      case SPARSEC_BOOL: ((uint8_t *)data)[i] = 1; break;
      default: memset((char *)data + i * (int64_t)element_bytes(input->dtype), 0,
                      element_bytes(input->dtype));
    }
  }
}

static void print_output(const sparsec_tensor_v1 *output, const int64_t *shape, const void *data) {
  printf("%s: [", output->name);
  for (uint32_t axis = 0; axis < output->rank; axis++)
    printf("%s%" PRId64, axis ? ", " : "", shape[axis]);
  printf("]");
  int64_t count = product(shape, output->rank);
  if (output->dtype == SPARSEC_F32)
    for (int64_t i = 0; i < count && i < 8; i++) printf(" %g", ((const float *)data)[i]);
  printf("\n");
}

static void *allocate(int64_t count, uint32_t dtype) {
  size_t bytes = (size_t)count * element_bytes(dtype);
  void *data = aligned_alloc(64, (bytes / 64 + 1) * 64);
  if (!data) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  return data;
}

static int run_model(const sparsec_model_v1 *model, sparsec_context *context,
                     const int64_t *sizes) {
  int64_t shapes[MAX_PORTS][SPARSEC_MAX_RANK];
  const int64_t *shape_of[MAX_PORTS];
  void *inputs[MAX_PORTS] = {0}, *outputs[MAX_PORTS] = {0};

  for (uint32_t i = 0; i < model->input_count; i++) {
    const sparsec_tensor_v1 *input = &model->inputs[i];
    for (uint32_t axis = 0; axis < input->rank; axis++) {
      const sparsec_dim_v1 *dim = &input->dims[axis];
      shapes[i][axis] = dim->size >= 0 ? dim->size : dim->symbol == 0 ? sizes[0] : sizes[1];
    }
    shape_of[i] = shapes[i];
    int64_t count = product(shapes[i], input->rank);
    inputs[i] = allocate(count, input->dtype);
    fill(input, inputs[i], count);
  }

  int32_t status = model->prepare(context, shape_of);
  for (uint32_t i = 0; status == SPARSEC_OK && i < model->output_count; i++) {
    int64_t shape[SPARSEC_MAX_RANK];
    status = model->output_shape(context, i, shape);
    if (status != SPARSEC_OK) break;
    outputs[i] = allocate(product(shape, model->outputs[i].rank), model->outputs[i].dtype);
  }
  if (status == SPARSEC_OK) status = model->run(context, (const void *const *)inputs, outputs);
  if (status != SPARSEC_OK)
    fprintf(stderr, "%s: %s\n", model->status_text(status), model->last_error(context));

  for (uint32_t i = 0; status == SPARSEC_OK && i < model->output_count; i++) {
    int64_t shape[SPARSEC_MAX_RANK];
    model->output_shape(context, i, shape);
    print_output(&model->outputs[i], shape, outputs[i]);
  }
  for (uint32_t i = 0; i < model->input_count; i++) free(inputs[i]);
  for (uint32_t i = 0; i < model->output_count; i++) free(outputs[i]);
  return status == SPARSEC_OK ? 0 : 1;
}

int main(int argc, char **argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: %s ./model.so [batch] [sequence length]\n", argv[0]);
    return 2;
  }
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  query_function query = NULL;
  if (library) *(void **)&query = dlsym(library, "sparsec_query");
  if (!query) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const sparsec_model_v1 *model = query(SPARSEC_ABI_VERSION);
  if (!model) {
    fprintf(stderr, "%s: does not speak ABI version %u\n", argv[1], SPARSEC_ABI_VERSION);
    return 1;
  }
  if (model->input_count > MAX_PORTS || model->output_count > MAX_PORTS) {
    fprintf(stderr, "%s: more than %d inputs or outputs\n", argv[1], MAX_PORTS);
    return 1;
  }
  const char *missing = model->missing_feature();
  if (missing) {
    fprintf(stderr, "%s is compiled for %s; this CPU lacks %s\n", argv[1], model->required_isa,
            missing);
    return 1;
  }
  printf("%s\n", model->description);

  int64_t sizes[2] = {argc > 2 ? atoll(argv[2]) : 1, argc > 3 ? atoll(argv[3]) : 8};
  sparsec_context *context;
  int32_t status = model->context_create(NULL, &context);
  if (status != SPARSEC_OK) {
    fprintf(stderr, "no context: %s\n", model->status_text(status));
    return 1;
  }
  int result = run_model(model, context, sizes);
  model->context_destroy(context);
  dlclose(library);
  return result;
}
