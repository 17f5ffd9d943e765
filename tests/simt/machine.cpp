// A launch: clusters one after the other, the threads of a cluster in turns, each until it waits. Deterministic.
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "simt/state.h"

namespace ft::simt {

const Self* self = nullptr;
Launch current_launch;
Cluster cluster;
Tokens tokens;
std::string failure;
std::vector<Launch> launches;  // since the last reset, for tests

namespace {

const void* kernel_params = nullptr;
void (*call_kernel)(const void*, const void*) = nullptr;
char *begin_token = nullptr, *end_token = nullptr;
std::mutex one_launch;

// Under TSan thread 0 of each block is another fiber, or what all threads 0 write would look ordered.
int64_t shift = 0;
int fiber_of(int thread) {
#if defined(FT_SIMT_TSAN)
  return int((thread + shift) % int64_t(cluster.threads.size()));
#else
  return thread;
#endif
}

void exit_thread(Thread& t) {
  const int lane = t.thread % device::kWarp;
  const Thread* warp = &t - lane;
  for (int other = 0; other < device::kWarp; ++other) {
    if (warp[other].state == State::kCollective && warp[other].request.mask >> lane & 1) {
      fail(name_of(t) + " exits while lane " + std::to_string(other) + " waits for it at " +
           text_of(warp[other].where));
    }
  }
  Block& block = cluster.blocks[t.rank];
  if (block.meeting.arrived) fail(name_of(t) + " exits while others wait at " + text_of(block.meeting.where));
  if (cluster.meeting.arrived) fail(name_of(t) + " exits while others wait at " + text_of(cluster.meeting.where));
  t.state = State::kDone;
  order_release(end_token);
  order_release(block.exit_token);
  --cluster.live;
  if (--block.live == 0) {
    order_acquire(block.exit_token);
    close_arena(block);
    order_release(end_token);
  }
}

void run_fiber(int) {
  for (;;) {
    order_acquire(begin_token);
    call_kernel(current_launch.kernel, kernel_params);
    exit_thread(running());
    fibers.suspend();
  }
}

void check(const device::Grid& grid) {
  const auto& m = settings().machine;
  const auto require = [](bool right, const char* what) {
    if (!right) throw std::runtime_error(std::string("simt: launch with ") + what);
  };
  require(grid.threads >= device::kWarp && grid.threads <= 1024 && grid.threads % device::kWarp == 0,
          "a number of threads that is not a multiple of 32 from 32 to 1024");
  require(grid.cluster >= 1 && grid.cluster <= m.most_cluster, "a larger cluster than the machine has");
  require(grid.blocks >= 0 && grid.blocks <= device::kMostBlocks, "more blocks than kMostBlocks");
  require(grid.blocks % grid.cluster == 0, "a number of blocks that is not a multiple of the cluster");
  require(grid.shared_bytes >= 0 && grid.shared_bytes <= m.shared_per_block,
          "more shared memory than a block may have");
}

void begin_cluster(int64_t first_block) {
  const auto& grid = current_launch.grid;
  for (int rank = 0; rank < grid.cluster; ++rank) {
    Block& block = cluster.blocks[rank];
    block = {};
    block.live = grid.threads;
    block.meeting.token[0] = tokens.next();
    block.meeting.token[1] = tokens.next();
    block.exit_token = tokens.next();
    for (int i = 0; i < grid.threads; ++i) {
      Thread& t = cluster.threads[rank * grid.threads + i];
      t = {};
      t.thread = i;
      t.rank = rank;
      t.block = first_block + rank;
      t.state = State::kReady;
    }
  }
  cluster.meeting = {};
  cluster.meeting.token[0] = tokens.next();
  cluster.meeting.token[1] = tokens.next();
  cluster.live = int(cluster.threads.size());
  cluster.warp_turns.assign(cluster.threads.size(), 0);
  cluster.warp_tokens.resize(2 * cluster.threads.size());
#if defined(FT_SIMT_TSAN)
  for (char*& token : cluster.warp_tokens) token = tokens.next();
#endif
  make_arenas();
  order_release(begin_token);
}

const char* state_text(State state) {
  switch (state) {
    case State::kBlockBarrier:
      return "wait at the barrier";
    case State::kClusterBarrier:
      return "wait at the cluster_barrier";
    case State::kCollective:
      return "wait for other lanes";
    case State::kDone:
      return "have exited";
    case State::kReady:
      break;
  }
  return "are ready";
}

// Runs of threads that are in the same state at the same place.
std::string deadlock() {
  std::string text = "deadlock";
  const auto& all = cluster.threads;
  for (size_t i = 0, next; i < all.size() && text.size() < 2000; i = next) {
    const bool done = all[i].state == State::kDone;
    for (next = i + 1; next < all.size(); ++next) {
      const bool alike = all[next].state == all[i].state && all[next].rank == all[i].rank &&
                         (done || all[next].where.line() == all[i].where.line());
      if (!alike) break;
    }
    text += "\n  block " + std::to_string(all[i].block) + ", threads " + std::to_string(all[i].thread) + " to " +
            std::to_string(all[next - 1].thread) + " " + state_text(all[i].state);
    if (!done) text += " at " + text_of(all[i].where);
  }
  return text;
}

void run_cluster() {
  const int count = int(cluster.threads.size());
  while (cluster.live > 0) {
    bool progress = false;
    for (int i = 0; i < count; ++i) {
      const int index = settings().reverse ? count - 1 - i : i;
      Thread& t = cluster.threads[index];
      if (t.state != State::kReady) continue;
      progress = true;
      self = &t;
      fibers.resume(fiber_of(index));
      if (!failure.empty()) throw std::runtime_error("simt: " + failure);
    }
    if (!progress) throw std::runtime_error("simt: " + deadlock());
  }
}

}  // namespace

Fibers fibers(run_fiber);

void wait(State state, const Where& where) {
  Thread& t = running();
  t.state = state;
  t.where = where;
  fibers.suspend();
}

std::string text_of(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string name_of(const Thread& t) {
  return "block " + std::to_string(t.block) + ", thread " + std::to_string(t.thread);
}

// On a fiber: back to the scheduler for ever, which throws.
void fail(const std::string& what) {
  if (!fibers.inside()) throw std::runtime_error("simt: " + what);
  failure = what;
  fibers.suspend();
  __builtin_unreachable();
}

void fail(const char* what, const Where& where) {
  fail(std::string(what) + " at " + text_of(where) + (fibers.inside() ? ", by " + name_of(running()) : ""));
}

void run(const device::Grid& grid, const void* kernel, const void* params, void (*call)(const void*, const void*)) {
  const std::lock_guard lock(one_launch);
  check(grid);
  if (grid.blocks == 0) return;  // as launch.cuh
  current_launch = {grid};
  current_launch.kernel = kernel;
  kernel_params = params;
  call_kernel = call;
  failure.clear();
  cluster.blocks.assign(grid.cluster, {});
  cluster.threads.assign(size_t(grid.cluster) * grid.threads, {});
  fibers.at_least(int(cluster.threads.size()));
  begin_token = tokens.next();
  end_token = tokens.next();
  const auto clean = [&] {
    order_acquire(end_token);
    free_arenas();
    tokens.clear();
  };
  try {
    const int64_t clusters = grid.blocks / grid.cluster;
    for (int64_t i = 0; i < clusters; ++i) {
      shift = i;
      begin_cluster((settings().reverse ? clusters - 1 - i : i) * grid.cluster);
      run_cluster();
      check_arenas();
    }
  } catch (const std::runtime_error& error) {
#if defined(FT_SIMT_TSAN)
    // Nothing orders this thread after the fibers that are left in the middle: whatever it did next would be a race.
    std::fprintf(stderr, "%s\n", error.what());
    std::_Exit(1);
#endif
    fibers.clear();
    clean();
    throw;
  }
  clean();
#if defined(FT_SIMT_COUNT)
  launches.push_back(current_launch);
#endif
}

}  // namespace ft::simt
