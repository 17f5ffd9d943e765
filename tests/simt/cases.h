// What the standalone cases share: buffers of exactly the bytes that a kernel may touch, random values, verdicts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.cuh"

extern "C" int ft_simt_set_machine(const char* name);
extern "C" int ft_simt_set_order(const char* name);
extern "C" int64_t ft_simt_launches();
extern "C" void ft_simt_reset();
extern "C" void ft_simt_launch(int64_t i, int64_t* out);

namespace ft::cases {

inline int failures = 0, checks = 0;

// Counts a failure, and says it if it is one of the first. With FT_CASES_STOP set (mutate.py), no other follows.
template <class... Values>
void fail(const char* format, Values... values) {
  static const bool stop = std::getenv("FT_CASES_STOP") != nullptr;
  if (++failures <= 20) std::printf(format, values...);
  if (stop) std::_Exit(1);
}

// The same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }
  double normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum - 6;
  }

 private:
  uint64_t state_;
};

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "f64";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat16:
      return "f16";
    case DType::kFloat32:
      break;
  }
  return "f32";
}

// What one rounding to this type adds, relative; and below the normal range, absolute.
inline double roundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat16:
      return 0x1p-11;
    case DType::kFloat32:
      break;
  }
  return 0x1p-24;
}
inline double smallest_step(DType dtype) {
  return dtype == DType::kFloat16 ? 0x1p-24 : dtype == DType::kFloat64 ? 0x1p-1074 : 0x1p-133;
}

// n values, the first of them `offset` elements behind an address that is aligned to 256 bytes. Under
// AddressSanitizer the memory ends with them; elsewhere NaN lies on both sides, which a kernel must neither use nor
// overwrite.
class Buffer {
 public:
  Buffer(DType dtype, int64_t n, int64_t offset = 0) : dtype_(dtype), n_(n), before_(offset * size_of(dtype)) {
#if defined(FT_SIMT_ASAN)
    const int64_t after = 0;
#else
    before_ += 256;
    const int64_t after = 256;
#endif
    bytes_ = before_ + n * size_of(dtype) + after;
    void* p = nullptr;
    if (posix_memalign(&p, 256, std::max<int64_t>(1, bytes_))) throw std::bad_alloc();
    memory_.reset(static_cast<unsigned char*>(p));
    std::memset(p, 0xff, bytes_);
  }

  DType dtype() const { return dtype_; }
  int64_t size() const { return n_; }
  void* data() const { return memory_.get() + before_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get() + before_);
  }

  double get(int64_t i) const {
    return with_dtype(dtype_, [&](auto tag) { return double(device::widen(as<decltype(tag)>()[i])); });
  }
  void set(int64_t i, double x) {
    with_dtype(dtype_, [&](auto tag) {
      using S = decltype(tag);
      if constexpr (sizeof(S) >= 4) {
        as<S>()[i] = S(x);
      } else {
        device::narrow(float(x), as<S>()[i]);
      }
    });
  }
  void fill(Random& random, double scale) {
    for (int64_t i = 0; i < n_; ++i) set(i, scale * random.normal());
  }
  bool intact() const {
    const auto poisoned = [](const unsigned char* p, int64_t n) {
      return std::all_of(p, p + n, [](unsigned char c) { return c == 0xff; });
    };
    const int64_t end = before_ + n_ * size_of(dtype_);
    return poisoned(memory_.get(), before_) && poisoned(memory_.get() + end, bytes_ - end);
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  DType dtype_;
  int64_t n_, before_, bytes_ = 0;
  std::unique_ptr<unsigned char, Free> memory_;
};

inline void expect(bool right, const std::string& what) {
  ++checks;
  if (!right) fail("FAIL  %s\n", what.c_str());
}

// Written so that a NaN is not within any tolerance. The words are put together only where they are needed.
inline void expect_close(double actual, double exact, double tolerance, const std::string& what, int64_t index = -1) {
  ++checks;
  const bool both_nan = actual != actual && exact != exact;
  if (both_nan || actual == exact || std::fabs(actual - exact) <= tolerance) return;
  const std::string at = index < 0 ? "" : " [" + std::to_string(index) + "]";
  fail("FAIL  %s%s: %.9g, exactly %.9g, allowed %.3g\n", what.c_str(), at.c_str(), actual, exact, tolerance);
}

// One rounding to the buffer's type of a value within `slack` of exact.
inline void expect_rounded(const Buffer& b, int64_t i, double exact, double slack, const std::string& what) {
  const double step = std::max(roundoff(b.dtype()) * (std::fabs(exact) + slack), smallest_step(b.dtype()));
  expect_close(b.get(i), exact, slack + 1.001 * step, what, i);
}

// The launches of one call, where the build counts them.
struct Launched {
  int64_t blocks, threads, cluster, shared_bytes, loaded, stored, kernel;
};
class Counted {
 public:
#if defined(FT_SIMT_COUNT)
  static constexpr bool kCounts = true;
  Counted() { ft_simt_reset(); }
  std::vector<Launched> launches() const {
    std::vector<Launched> all;
    for (int64_t i = 0; i < ft_simt_launches(); ++i) ft_simt_launch(i, &all.emplace_back().blocks);
    return all;
  }
#else
  static constexpr bool kCounts = false;
  std::vector<Launched> launches() const { return {}; }
#endif
  // Requested bytes of all launches.
  void expect_bytes(int64_t loaded, int64_t stored, const std::string& what) const {
    if (!kCounts) return;
    for (const Launched& l : launches()) {
      loaded -= l.loaded;
      stored -= l.stored;
    }
    expect(loaded == 0 && stored == 0, what + ": requested bytes");
  }
};

// What a sanitizer sees does not depend on the order.
#if defined(FT_SIMT_ASAN) || defined(FT_SIMT_TSAN)
constexpr bool kOneOrder = true;
#else
constexpr bool kOneOrder = false;
#endif

// Runs `all` on these machines, threads and blocks from the first and from the last. Arguments: one machine, one
// order.
template <class Fn>
int main_of(int count, char** arguments, std::initializer_list<const char*> machines, const Fn& all) {
  try {
    for (const char* machine : machines) {
      if (count > 1 && std::strcmp(arguments[1], machine) != 0) continue;
      ft_simt_set_machine(machine);
      for (const char* order : {"forward", "reverse"}) {
        if (kOneOrder && count < 3 && std::strcmp(order, "reverse") != 0) continue;
        if (count > 2 && std::strcmp(arguments[2], order) != 0) continue;
        ft_simt_set_order(order);
        const int before = checks;
        all(machine);
        std::printf("%s %s: %d checks, %d failures\n", machine, order, checks - before, failures);
        if (failures) return 1;
      }
    }
  } catch (const std::exception& error) {
    std::printf("ERROR  %s\n", error.what());
    return 1;
  }
  return checks == 0;
}

}  // namespace ft::cases
