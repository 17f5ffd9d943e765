// What the machine keeps of a launch that runs: threads, blocks of the cluster in work, tokens for ThreadSanitizer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "simt/fiber.h"

namespace ft::simt {

enum class State { kReady, kBlockBarrier, kClusterBarrier, kCollective, kDone };

struct Request {  // of a thread that waits with its warp
  Collective kind = Collective::kNone;
  uint32_t mask = 0;
  uint64_t value = 0;
  int bytes = 0, from = 0;
};

struct Thread : Self {
  State state = State::kDone;
  Where where;  // it waits
  Request request;
  uint64_t result = 0;
};

// Threads that wait for each other. `token[turn]` orders memory: two, because a thread may reach the next barrier
// before another one has left this one.
struct Meeting {
  int arrived = 0, turn = 0;
  bool once = false;  // all have met here once
  Where where;        // of the first to arrive
  char* token[2] = {};
};

struct Block {
  unsigned char* arena = nullptr;
  int live = 0;
  Meeting meeting;
  char* exit_token = nullptr;
};

// Addresses that nobody else has during a launch. They are never read or written.
class Tokens {
 public:
  char* next();
  void clear();

 private:
  static constexpr int kPage = 1 << 16;
  std::vector<char*> pages_;
  int used_ = kPage;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Thread> threads;  // all of block 0, all of block 1, ...
  std::vector<char*> warp_tokens;
  std::vector<uint8_t> warp_turns;
  Meeting meeting;
  int live = 0;
};

struct Settings {
  device::Machine machine;
  bool reverse = false;    // blocks and threads from the last to the first
  bool rough_exp2 = true;  // as far off as device.cuh allows
};
Settings& settings();

extern Cluster cluster;
extern Tokens tokens;
extern Fibers fibers;
extern std::string failure;
inline Thread& running() { return const_cast<Thread&>(static_cast<const Thread&>(*self)); }
inline Block& running_block() { return cluster.blocks[self->rank]; }

void wait(State state, const Where& where);  // until another thread makes this one ready
std::string name_of(const Thread& t);
std::string text_of(const Where& where);
[[noreturn]] void fail(const std::string& what);

void make_arenas();  // shared memory of the cluster's blocks: fresh, poisoned with NaN
void close_arena(Block& block);
void check_arenas();
void free_arenas();  // at the end of a launch, failed or not

}  // namespace ft::simt
