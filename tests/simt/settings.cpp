// Which machine this is, and what tests may ask of it: a C interface, for ctypes.
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "simt/state.h"

namespace ft::simt {

extern std::vector<Launch> launches;

namespace {

struct Personality {
  const char* name;
  device::Machine machine;
};
constexpr int64_t kKiB = 1024;
constexpr Personality kMachines[] = {
    {"sm_90", {132, 227 * kKiB, 228 * kKiB, 8}},
    {"sm_80", {108, 163 * kKiB, 164 * kKiB, 1}},
    // Small rows reach every path.
    {"tiny", {4, 12 * kKiB, 26 * kKiB, 2}},
};

bool choose_machine(Settings& s, const char* name) {
  for (const Personality& p : kMachines) {
    if (std::strcmp(p.name, name) == 0) {
      s.machine = p.machine;
      return true;
    }
  }
  return false;
}

bool choose_order(Settings& s, const char* name) {
  s.reverse = std::strcmp(name, "reverse") == 0;
  return s.reverse || std::strcmp(name, "forward") == 0;
}

bool choose_exp2(Settings& s, const char* name) {
  s.rough_exp2 = std::strcmp(name, "rough") == 0;
  return s.rough_exp2 || std::strcmp(name, "exact") == 0;
}

void from_environment(Settings& s, const char* variable, const char* otherwise,
                      bool (*choose)(Settings&, const char*)) {
  const char* value = std::getenv(variable);
  if (!choose(s, value ? value : otherwise)) {
    throw std::runtime_error(std::string("simt: ") + variable + " is not one of its values (tests/simt/README.md)");
  }
}

Settings initial() {
  Settings s;
  from_environment(s, "FT_SIMT_MACHINE", "sm_90", choose_machine);
  from_environment(s, "FT_SIMT_ORDER", "forward", choose_order);
  from_environment(s, "FT_SIMT_EXP", "rough", choose_exp2);
  return s;
}

}  // namespace

Settings& settings() {
  static Settings s = initial();
  return s;
}

const device::Machine& machine() { return settings().machine; }

// ex2.approx.ftz: within 2 units in the last place, exact at 0; which of them is anybody's guess, so a hash's.
float rough_exp2(float x) {
  float y = std::exp2(x);
  if (settings().rough_exp2 && x != 0 && y >= 0x1p-126f && y < 0x1p127f) {
    const uint32_t hash = std::bit_cast<uint32_t>(x) * 2654435761u;
    y = std::bit_cast<float>(std::bit_cast<uint32_t>(y) + (hash >> 16) % 5 - 2);
  }
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace ft::simt

#define FT_C_API extern "C" __attribute__((visibility("default")))

// 1 where the name is known, else 0.
FT_C_API int ft_simt_set_machine(const char* name) { return ft::simt::choose_machine(ft::simt::settings(), name); }
FT_C_API int ft_simt_set_order(const char* name) { return ft::simt::choose_order(ft::simt::settings(), name); }
FT_C_API int ft_simt_set_exp2(const char* name) { return ft::simt::choose_exp2(ft::simt::settings(), name); }

// Launches since the last reset; each as blocks, threads, cluster, shared bytes, bytes loaded, bytes stored, kernel.
FT_C_API int64_t ft_simt_launches() { return int64_t(ft::simt::launches.size()); }
FT_C_API void ft_simt_reset() { ft::simt::launches.clear(); }
FT_C_API void ft_simt_launch(int64_t i, int64_t* out) {
  const auto& l = ft::simt::launches.at(i);
  const int64_t values[] = {l.grid.blocks,
                            l.grid.threads,
                            l.grid.cluster,
                            l.grid.shared_bytes,
                            l.loaded,
                            l.stored,
                            reinterpret_cast<int64_t>(l.kernel)};
  std::memcpy(out, values, sizeof values);
}
