#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

// The sanitizer is named by the build, not asked of the compiler: under TSan this file is compiled without it, so
// that the machine's own bookkeeping is not taken for the kernel's.
#if defined(FT_SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
void __tsan_write_range(void* p, unsigned long bytes);
}
#elif defined(FT_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// What fibers that are left in the middle of an error held is not freed.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

// void ft_simt_switch(void** save, void* to): what the ABI lets a function keep, onto the stack; the stack pointer to
// *save; and the same from `to`.
extern "C" void ft_simt_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl ft_simt_switch
.hidden ft_simt_switch
.type ft_simt_switch,@function
ft_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ft_simt_switch,.-ft_simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl ft_simt_switch
.hidden ft_simt_switch
.type ft_simt_switch,%function
ft_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size ft_simt_switch,.-ft_simt_switch
)");
#else
#error "tests/simt/fiber.cpp: a context switch for this processor is missing"
#endif

namespace ft::simt {
namespace {

#if defined(FT_SIMT_ASAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kGuard = 4096;  // below each stack: an overflow stops at once
constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber_no_sync
constexpr int kMostUnderTsan = 8000;

Fibers* active = nullptr;  // whose fiber runs: start() has no arguments

}  // namespace

void Fibers::at_least(int count) {
  const int before = int(fibers_.size());
  if (count <= before) return;
#if defined(FT_SIMT_TSAN)
  if (count > kMostUnderTsan) throw std::runtime_error("simt: ThreadSanitizer takes at most 8128 threads");
#else
  static_cast<void>(kMostUnderTsan);
#endif
  const size_t bytes = size_t(count - before) * kStack;
  void* slab = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (slab == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
  slabs_.emplace_back(static_cast<char*>(slab), bytes);
  fibers_.resize(count);
  for (int i = before; i < count; ++i) {
    fibers_[i].stack = static_cast<char*>(slab) + size_t(i - before) * kStack;
    mprotect(fibers_[i].stack, kGuard, PROT_NONE);
    prepare(i);
  }
}

// A stack on which ft_simt_switch "returns" into start().
void Fibers::prepare(int i) {
  Fiber& f = fibers_[i];
  void** top = reinterpret_cast<void**>(f.stack + kStack);
#if defined(__x86_64__)
  *--top = nullptr;  // start() has no caller; the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(&Fibers::start);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
#else
  top -= 20;
  for (int k = 0; k < 20; ++k) top[k] = nullptr;
  top[11] = reinterpret_cast<void*>(&Fibers::start);
#endif
  f.top = top;
#if defined(FT_SIMT_TSAN)
  f.sanitizer = __tsan_create_fiber(0);
#endif
}

void Fibers::clear() {
  for (Fiber& f : fibers_) {
#if defined(FT_SIMT_TSAN)
    __tsan_destroy_fiber(f.sanitizer);
#else
    static_cast<void>(f);
#endif
  }
  for (auto [slab, bytes] : slabs_) {
    allow(slab, bytes);  // the redzones of forgotten frames
    munmap(slab, bytes);
  }
  fibers_.clear();
  slabs_.clear();
}

void Fibers::start() {
#if defined(FT_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &active->main_bottom_, &active->main_size_);
#endif
  active->entry_(active->running_);
  std::abort();
}

void Fibers::resume(int i) {
  Fiber& f = fibers_[i];
  running_ = i;
  active = this;
#if defined(FT_SIMT_TSAN)
  main_.sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(f.sanitizer, kNoSync);
#elif defined(FT_SIMT_ASAN)
  __sanitizer_start_switch_fiber(&main_.sanitizer, f.stack + kGuard, kStack - kGuard);
#else
  static_cast<void>(kNoSync);
#endif
  ft_simt_switch(&main_.top, f.top);
#if defined(FT_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(main_.sanitizer, nullptr, nullptr);
#endif
  running_ = -1;
}

void Fibers::suspend() {
  Fiber& f = fibers_[running_];
#if defined(FT_SIMT_TSAN)
  __tsan_switch_to_fiber(main_.sanitizer, kNoSync);
#elif defined(FT_SIMT_ASAN)
  __sanitizer_start_switch_fiber(&f.sanitizer, main_bottom_, main_size_);
#endif
  ft_simt_switch(&f.top, main_.top);
#if defined(FT_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(f.sanitizer, nullptr, nullptr);
#endif
}

#if defined(FT_SIMT_TSAN)
void order_release(void* token) { __tsan_release(token); }
void order_acquire(void* token) { __tsan_acquire(token); }
void pretend_write(void* p, size_t bytes) { __tsan_write_range(p, bytes); }
#else
void order_release(void*) {}
void order_acquire(void*) {}
void pretend_write(void*, size_t) {}
#endif

#if defined(FT_SIMT_ASAN)
void forbid(void* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
void allow(void* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
#else
void forbid(void*, size_t) {}
void allow(void*, size_t) {}
#endif

}  // namespace ft::simt
