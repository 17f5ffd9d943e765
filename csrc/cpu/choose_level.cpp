// Which SIMD level runs: the best one that was built and that this CPU has, FASTTRANSFER_SIMD, or set_level().
#include "cpu/choose_level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

namespace ft {

namespace baseline {
extern const Kernels table;
}
#if defined(FT_HAVE_AVX2)
namespace avx2 {
extern const Kernels table;
}
#endif
#if defined(FT_HAVE_AVX512)
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

bool cpu_has(const char* level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(level, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (std::strcmp(level, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return std::strcmp(level, "baseline") == 0;
}

// Best first.
constexpr const Kernels* const kTables[] = {
#if defined(FT_HAVE_AVX512)
    &avx512::table,
#endif
#if defined(FT_HAVE_AVX2)
    &avx2::table,
#endif
    &baseline::table,
};

const Kernels* find(const std::string& level) {
  for (const Kernels* table : kTables) {
    if (level == table->level && cpu_has(table->level)) return table;
  }
  return nullptr;
}

const Kernels* best() {
  for (const Kernels* table : kTables) {
    if (cpu_has(table->level)) return table;
  }
  return &baseline::table;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{best()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> available_levels() {
  std::vector<std::string> levels;
  for (const Kernels* table : kTables) {
    if (cpu_has(table->level)) levels.emplace_back(table->level);
  }
  return levels;
}

bool set_level(const std::string& level) {
  const Kernels* table = level == "auto" ? best() : find(level);
  if (!table) return false;
  current().store(table, std::memory_order_relaxed);
  return true;
}

}  // namespace ft
