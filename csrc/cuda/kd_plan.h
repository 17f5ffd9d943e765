// Which kernel computes a call of kd, with how many threads, in clusters of how many blocks.
//
//   kShort   V <= 1024, one type                     rows in registers
//   kRow     a row fits a block, or a cluster        read once, in shared memory
//   kSweep   else                                    online
//   kAny     types differ, or float64                online, logit by logit
//
// FASTTRANSFER_KD_PLAN overrides parts of a plan, for tests and for tuning on a GPU: a list such as "path=row",
// "path=row,keep=0,cluster=4,threads=256". What does not fit the call is an error.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

namespace ft::distill {

enum class KdPath { kShort, kRow, kSweep, kAny };

// What a plan is made for.
struct KdShape {
  int64_t columns;
  int element_bytes;  // of both inputs; 0 where their types differ
  bool is_double;
  bool gradient;
  bool hot;  // a row may have a label term at T != 1: a third exponential
};

struct KdPlan {
  KdPath path = KdPath::kAny;
  int threads = 0;
  int cluster = 1;
  bool keep = false;  // kRow: exponentials, not logits, stay in shared memory
  int slots = 0;      // kRow: vectors per block
  int lanes = 0;      // kShort: per row
  int elements = 0;   // kShort: per lane
  int64_t shared_bytes = 0;
};

inline constexpr int64_t kShortColumns = 1024;
// The plan of kRow in a cluster of this size, whatever the machine. header: shared memory beside the vectors.
inline KdPlan row_plan(const KdShape& shape, int cluster, bool keep, int64_t header) {
  const int64_t lanes = 16 / shape.element_bytes;
  // A row may begin inside a vector.
  const int64_t vectors = (shape.columns + 2 * (lanes - 1)) / lanes, slots = (vectors + cluster - 1) / cluster;
  KdPlan plan;
  plan.path = KdPath::kRow;
  plan.cluster = cluster;
  plan.keep = keep;
  plan.slots = int(slots < (int64_t{1} << 24) ? slots : int64_t{1} << 24);
  plan.shared_bytes = header + plan.slots * 16 * (keep && shape.element_bytes == 2 ? 4 : 2);
  return plan;
}

// A multiprocessor has registers for 16 warps of kd_row_kernel: shared by the blocks that its shared memory has room
// for, and at least two vectors per thread where the row has that many.
inline int row_threads(const KdPlan& plan, int blocks) {
  const int most = blocks >= 3 ? 160 : blocks == 2 ? 256 : 512;
  int threads = device::kWarp;
  while (threads < most && plan.slots >= 4 * threads) threads *= 2;
  return threads < most ? threads : most;
}

// Blocks of this plan that share a multiprocessor's shared memory.
inline int resident(const device::Machine& machine, int64_t shared_bytes) {
  if (shared_bytes > machine.shared_per_block) return 0;
  const int64_t blocks = machine.shared_per_multiprocessor / (shared_bytes + 1024);
  return blocks < 1 ? 1 : blocks > 16 ? 16 : int(blocks);
}

// kRow if a row fits: the smallest cluster with which three blocks share a multiprocessor, else two, else one; with
// fewer than three the exponentials are kept before a third block is. Without a gradient there are none to keep, but
// the row is cut among threads as with one: the loss is then the same to the last bit.
inline bool plan_row(const KdShape& shape, const device::Machine& machine, int64_t header, KdPlan& best) {
  struct Wish {
    bool keep;
    int blocks;
  };
  const Wish with_keep[] = {{true, 3}, {true, 2}, {false, 3}, {false, 2}, {false, 1}};
  const Wish fp32[] = {{true, 3}, {true, 2}, {true, 1}, {true, 1}, {true, 1}};
  const Wish hot[] = {{false, 3}, {false, 2}, {false, 1}, {false, 1}, {false, 1}};
  for (const Wish& wish : shape.hot ? hot : shape.element_bytes == 4 ? fp32 : with_keep) {
    for (int cluster = 1; cluster <= machine.most_cluster; cluster *= 2) {
      const KdPlan plan = row_plan(shape, cluster, wish.keep, header);
      if (resident(machine, plan.shared_bytes) < wish.blocks) continue;
      best = row_plan(shape, cluster, wish.keep && shape.gradient, header);
      best.threads = row_threads(plan, wish.blocks);
      return true;
    }
  }
  return false;
}

inline KdPlan short_plan(const KdShape& shape) {
  KdPlan plan;
  plan.path = KdPath::kShort;
  plan.elements = shape.columns <= 256 ? 8 : 32;
  plan.lanes = 1;
  while (int64_t{plan.lanes} * plan.elements < shape.columns) plan.lanes *= 2;
  return plan;
}

inline bool one_type(const KdShape& shape) { return shape.element_bytes != 0 && !shape.is_double; }

inline KdPlan plan_kd(const KdShape& shape, const device::Machine& machine, int64_t header) {
  KdPlan plan;
  if (!one_type(shape)) return plan;
  if (shape.columns <= kShortColumns) return short_plan(shape);
  if (plan_row(shape, machine, header, plan)) return plan;
  plan.path = KdPath::kSweep;
  return plan;
}

// A plan as FASTTRANSFER_KD_PLAN wants it.
inline KdPlan plan_as_told(KdPlan plan, const char* told, const KdShape& shape, const device::Machine& machine,
                           int64_t header) {
  const std::string text = told;
  const auto refuse = [&](const char* why) {
    throw std::runtime_error("fasttransfer: FASTTRANSFER_KD_PLAN=" + text + ": " + why);
  };
  const auto value_of = [&](const char* key) -> std::string {
    const std::string list = "," + text + ",", start = std::string(",") + key + "=";
    const size_t at = list.find(start);
    if (at == std::string::npos) return "";
    const size_t begin = at + start.size();
    return list.substr(begin, list.find(',', begin) - begin);
  };
  const auto number_of = [&](const char* key, int otherwise) {
    const std::string value = value_of(key);
    return value.empty() ? otherwise : std::atoi(value.c_str());
  };
  const std::string path = value_of("path");
  if (path == "any") {
    plan = KdPlan{};
  } else if (path == "sweep") {
    if (!one_type(shape)) refuse("the types differ");
    plan = KdPlan{};
    plan.path = KdPath::kSweep;
  } else if (path == "short") {
    if (!one_type(shape) || shape.columns > kShortColumns) refuse("not a short row of one type");
    plan = short_plan(shape);
  } else if (path == "row") {
    if (!one_type(shape)) refuse("the types differ");
    if (plan.path != KdPath::kRow && !plan_row(shape, machine, header, plan) && value_of("cluster").empty()) {
      refuse("the row does not fit");
    }
    const bool keep = number_of("keep", plan.keep) && shape.gradient;
    if (keep && shape.hot) refuse("these exponentials cannot be kept");
    const int threads = number_of("threads", plan.threads > 0 ? plan.threads : 256);
    plan = row_plan(shape, number_of("cluster", plan.cluster), keep, header);
    plan.threads = threads;
    if (plan.cluster > machine.most_cluster || plan.shared_bytes > machine.shared_per_block) refuse("too large");
    if (threads % device::kWarp != 0 || threads < device::kWarp || threads > 512) refuse("threads: 32, 64, ... 512");
  } else if (!path.empty()) {
    refuse("path is short, row, sweep or any");
  }
  return plan;
}

}  // namespace ft::distill
