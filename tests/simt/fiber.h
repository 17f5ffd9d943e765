// Fibers: stacks that one OS thread switches between, told to the sanitizers. Switching does not order memory for
// ThreadSanitizer: what is ordered, the machine says with order_release and order_acquire, as a GPU's barriers do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

namespace ft::simt {

class Fibers {
 public:
  using Entry = void (*)(int fiber);

  explicit Fibers(Entry entry) : entry_(entry) {}
  ~Fibers() { clear(); }
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;

  // So many at least; entry(i) runs when fiber i is first resumed, and never returns.
  void at_least(int count);
  void clear();  // also of fibers in the middle of their work: their frames are forgotten, not unwound

  void resume(int fiber);  // from the OS thread's own stack
  void suspend();          // back to it
  bool inside() const { return running_ >= 0; }

 private:
  struct Fiber {
    void* top = nullptr;  // the saved stack pointer
    char* stack = nullptr;
    void* sanitizer = nullptr;  // TSan's fiber, or ASan's fake stack
  };
  static void start();
  void prepare(int fiber);

  Entry entry_;
  std::deque<Fiber> fibers_;  // a running fiber refers to its own while more are made
  std::vector<std::pair<char*, size_t>> slabs_;
  int running_ = -1;
  Fiber main_;
  const void* main_bottom_ = nullptr;  // for ASan
  size_t main_size_ = 0;
};

// For ThreadSanitizer: what came before release(t) is visible after acquire(t). Nothing elsewhere.
void order_release(void* token);
void order_acquire(void* token);
// For ThreadSanitizer: as if these bytes were written here. Nothing elsewhere.
void pretend_write(void* p, size_t bytes);
// For AddressSanitizer. Nothing elsewhere.
void forbid(void* p, size_t bytes);
void allow(void* p, size_t bytes);

}  // namespace ft::simt
