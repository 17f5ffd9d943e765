// The harness's own test: right kernels run, and each kind of error is found. Kernels here are small and plain.
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.cuh"

extern "C" int ft_simt_set_machine(const char* name);
extern "C" int ft_simt_set_order(const char* name);

namespace {

using namespace ft::device;

struct Params {
  const float* in;
  float* out;
  int64_t n;
  int wrong;  // which error
};

// A sum over the block: warps by shuffles, then the first warp, then all read the result.
FT_DEVICE float block_sum(float x) {
  float* const partial = shared<float>(0);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(kAllLanes, x, lanes);
  if (lane() == 0) partial[warp()] = x;
  barrier();
  float total = 0;
  for (int w = 0; w < threads() / kWarp; ++w) total += partial[w];
  barrier();
  return total;
}

FT_KERNEL void sum_kernel(FT_PARAMS(Params) p) {
  const int64_t share = (p.n + blocks() - 1) / blocks();
  float x = 0;
  for (int64_t i = thread(); i < share; i += threads()) {
    const int64_t at = block() * share + i;
    if (at < p.n) x += load(p.in + at);
  }
  const float total = block_sum(x);
  float* const own = shared<float>(128);
  if (thread() == 0) *own = total;
  cluster_barrier();
  if (thread() == 0 && cluster_rank() == 0) {
    float all = 0;
    for (int rank = 0; rank < cluster_size(); ++rank) all += *in_block(own, rank);
    store(p.out + block() / cluster_size(), all);
  }
  cluster_barrier();
}

FT_KERNEL void wrong_kernel(FT_PARAMS(Params) p) {
  float* const mine = shared<float>(0);
  const uint32_t low = 0x0000ffffu;
  const int t = thread();
  switch (p.wrong) {
    case 0:  // some threads never reach it
      if (t < 32) barrier();
      break;
    case 1:  // two barriers that meet
      if (t < 32) {
        barrier();
      } else {
        barrier();
      }
      break;
    case 2:  // a lane of the mask does other things
      if (lane() < 16) shuffle_xor(kAllLanes, 1.0f, 1);
      break;
    case 3:  // a caller that its mask does not name
      ballot(low, true);
      break;
    case 4:  // reads a lane that takes no part
      if (lane() < 16) shuffle(low, 1.0f, 16);
      break;
    case 5:  // xor out of the mask
      if (lane() < 16) shuffle_xor(low, 1.0f, 16);
      break;
    case 6:  // two masks at one time
      shuffle_xor(lane() < 16 ? low : kAllLanes, 1.0f, 1);
      break;
    case 7:  // two collectives that meet
      if (lane() < 16) {
        ballot(kAllLanes, true);
      } else {
        warp_barrier(kAllLanes);
      }
      break;
    case 8:
      load(reinterpret_cast<const float*>(reinterpret_cast<const char*>(p.in) + 2));
      break;
    case 9:
      *shared<float>(2) = 0;
      break;
    case 10:  // behind the arena
      if (t == 0) shared<volatile float>(0)[256] = 1;
      break;
    case 11:
      *shared<volatile float>(1028) = 1;
      break;
    case 12:  // the other block has exited, or exits before it is read
      cluster_barrier();
      if (cluster_rank() == 0) *in_block(mine, 1) = 1;
      if (cluster_rank() == 1) *in_block(mine, 0) = 1;
      break;
    case 13:
      in_block(mine, 2);
      break;
    case 14:
      if (cluster_rank() == 0) cluster_barrier();
      break;
    case 15: {  // a pointer that is not in shared memory
      float local = 0;
      in_block(&local, 0);
      break;
    }
    case 16:  // what nobody wrote is a NaN
      if (t == 0) store(p.out, mine[t]);
      break;
    case 17:  // for TSan: no barrier between the write and the read of a neighbour
      mine[t] = float(t);
      if (t == 0) store(p.out, mine[33]);
      break;
    case 18:  // for TSan: shuffles do not order memory
      mine[t] = float(t);
      ballot(kAllLanes, true);
      if (t == 0) store(p.out, mine[1]);
      break;
    case 19:  // for TSan: all blocks write to one place
      if (t == 0) store(p.out, 1.0f);
      break;
    case 20:  // for ASan: behind the tensor
      if (t == 0) store(p.out, load(p.in + p.n));
      break;
    case 21:  // for ASan and TSan: a remote write that nothing orders before the exit of its block
      cluster_barrier();
      if (cluster_rank() == 0) {
        float* const there = in_block(mine, 1);
        for (int i = 0; i < 3; ++i) barrier();
        if (t == 0) *there = 1;
      }
      break;
    case 22:  // the other block may not have started
      *in_block(mine, 1 - cluster_rank()) = 1;
      break;
  }
}

int failures = 0;

void expect(bool right, const std::string& what) {
  if (!right) ++failures;
  std::printf("%s  %s\n", right ? "ok  " : "FAIL", what.c_str());
}

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "";
}

void right_kernels(const char* order) {
  ft_simt_set_order(order);
  const int64_t n = 10007;
  std::unique_ptr<float[]> in(new float[n]);
  for (int64_t i = 0; i < n; ++i) in[i] = float(i % 7);
  double exact = 0;
  for (int64_t i = 0; i < n; ++i) exact += in[i];
  for (int cluster : {1, 2, 8}) {
    for (int threads : {32, 256}) {
      const Grid grid{16, threads, cluster, 132};
      std::unique_ptr<float[]> out(new float[16 / cluster]);
      launch(sum_kernel, grid, Stream{}, Params{in.get(), out.get(), n, 0});
      double sum = 0;
      for (int i = 0; i < 16 / cluster; ++i) sum += out[i];
      expect(sum == exact, std::string("sum, ") + order + ", cluster of " + std::to_string(cluster) + " x " +
                               std::to_string(threads));
    }
  }
}

[[maybe_unused]] void wrong(int which, int cluster, const char* message) {
  std::unique_ptr<float[]> in(new float[64]()), out(new float[64]());
  const Grid grid{4, 64, cluster, 1024};
  const std::string error =
      error_of([&] { launch(wrong_kernel, grid, Stream{}, Params{in.get(), out.get(), 64, which}); });
  expect(error.find(message) != std::string::npos, "error " + std::to_string(which) + ": " + error);
}

void wrong_launches() {
  const auto attempt = [](Grid grid, const char* message) {
    const std::string error =
        error_of([&] { launch(wrong_kernel, grid, Stream{}, Params{nullptr, nullptr, 0, -1}); });
    expect(error.find(message) != std::string::npos, "launch: " + error);
  };
  attempt({1, 33}, "multiple of 32");
  attempt({1, 1056}, "multiple of 32");
  attempt({3, 32, 2}, "multiple of the cluster");
  attempt({16, 32, 16}, "larger cluster");
  attempt({1, 32, 1, 228 << 10}, "more shared memory");
  ft_simt_set_machine("sm_80");
  attempt({2, 32, 2}, "larger cluster");
  ft_simt_set_machine("sm_90");
  launch(wrong_kernel, Grid{0, 32}, Stream{}, Params{nullptr, nullptr, 0, -1});
}

void conversions() {
  bool right = true;
  for (uint32_t u = 0; u < 65536; ++u) {
    const ft::Half h{uint16_t(u)};
    const ft::BFloat16 b{uint16_t(u)};
    ft::Half h2;
    ft::BFloat16 b2;
    const float x = widen(h), y = widen(b);
    narrow(x, h2);
    narrow(y, b2);
    if (x == x && h2.bits != u) right = false;
    if (y == y && b2.bits != u) right = false;
    if ((x != x) != ((u & 0x7fff) > 0x7c00) || (x != x && h2.bits != 0x7fff)) right = false;
    // Halfway to the next number is rounded to even.
    if ((u & 0x7fff) < 0x7bff) {
      const float middle = 0.5f * (x + widen(ft::Half{uint16_t(u + 1)}));
      narrow(middle, h2);
      if (h2.bits != (u % 2 ? u + 1 : u)) right = false;
    }
  }
  expect(right, "16-bit conversions");
  expect(exp2_fast(0) == 1 && exp2_fast(-INFINITY) == 0 && exp2_fast(-127) == 0 && exp2_fast(NAN) != exp2_fast(NAN),
         "exp2_fast at its special values");
}

}  // namespace

// Without an argument: everything that this build finds by itself. With one: that kernel, for a sanitizer to stop.
int main(int count, char** arguments) {
  if (count > 1) {
    std::unique_ptr<float[]> in(new float[64]()), out(new float[64]());
    const int which = std::atoi(arguments[1]);
    launch(wrong_kernel, Grid{4, 64, which == 21 ? 2 : 1, 1024}, Stream{}, Params{in.get(), out.get(), 64, which});
    return 0;
  }
  conversions();
  right_kernels("forward");
  right_kernels("reverse");
  ft_simt_set_order("forward");
  wrong_launches();
#if !defined(FT_SIMT_TSAN)  // where an error ends the program
  wrong(0, 1, "others wait at");
  wrong(1, 1, "is at the barrier of");
  wrong(2, 1, "exits while lane");
  wrong(3, 1, "by a lane that its mask does not name");
  wrong(4, 1, "which its mask 0x0000ffff does not name");
  wrong(5, 1, "which its mask 0x0000ffff does not name");
  wrong(6, 1, "which has exited");
  wrong(7, 1, "waits in ballot");
  wrong(8, 1, "not aligned to its size");
  wrong(9, 1, "not aligned to its type");
#if !defined(FT_SIMT_ASAN)
  wrong(10, 1, "outside its 1024 bytes");
#endif
  wrong(11, 1, "from byte 1028 of 1024");
  wrong(12, 2, "that has exited");
  wrong(13, 2, "outside the cluster");
  wrong(14, 2, "exits while others wait");
  wrong(15, 1, "outside shared memory");
  wrong(22, 2, "may not have started");
#endif
  {
    std::unique_ptr<float[]> out(new float[1]());
    launch(wrong_kernel, Grid{1, 32, 1, 1024}, Stream{}, Params{nullptr, out.get(), 0, 16});
    expect(out[0] != out[0], "what nobody wrote is a NaN");
  }
  right_kernels("forward");  // after errors, too
  std::printf("%d failures\n", failures);
  return failures != 0;
}
