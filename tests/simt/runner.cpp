// Runs one launcher of csrc/ on the CPU. Usage: runner <op> <case file> <result file>
#include <cstring>

#include "case.h"
#include "gcrb.h"

namespace {

using efrdn_fast::Dtype;
using simt::Case;

efrdn_fast::GcrbWeights gcrb_weights(const Case& c) {
  return {c.data("w1"), c.data("b1"), c.data("w2"), c.data("b2"),
          c.data("w3"), c.data("b3"), c.dtype("w1")};
}

cudaError_t gcrb_fwd(const Case& c) {
  const efrdn_fast::GcrbParams p{c.dtype("x"),  c.number("N"),  c.number("C"),      c.number("H"),
                                 c.number("W"), c.number("M"),  c.number("groups"), c.map("x"),
                                 c.map("y"),    gcrb_weights(c)};
  return efrdn_fast::launch_gcrb_fwd(p, nullptr);
}

const struct {
  const char* name;
  cudaError_t (*run)(const Case&);
} kOps[] = {{"gcrb_fwd", gcrb_fwd}};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: runner <op> <case file> <result file>\n");
    return 2;
  }
  for (const auto& op : kOps) {
    if (std::strcmp(op.name, argv[1])) continue;
    const Case arguments(argv[2]);
    const cudaError_t error = op.run(arguments);
    if (error != cudaSuccess) {
      std::fprintf(stderr, "%s: CUDA error %d\n", op.name, error);
      return 4;
    }
    arguments.write(argv[3]);
    return 0;
  }
  std::fprintf(stderr, "no op %s\n", argv[1]);
  return 2;
}
