// Where threads wait for each other: barriers of a block, of a cluster, and what a warp does together.
#include "simt/state.h"

namespace ft::simt {
namespace {

const char* const kNames[] = {"nothing", "shuffle", "shuffle_xor", "ballot", "warp_barrier"};

bool same_place(const Where& a, const Where& b) { return a.line() == b.line() && a.column() == b.column(); }

// All `expected` threads of [first, first + expected) at one barrier, and at the same one.
void meet(Meeting& m, int first, int expected, State state, const Where& where) {
  if (m.arrived == 0) m.where = where;
  if (!same_place(m.where, where)) {
    fail(name_of(running()) + " is at the barrier of " + text_of(where) + " while others wait at " +
         text_of(m.where));
  }
  char* const token = m.token[m.turn];
  order_release(token);
  if (++m.arrived < expected) {
    wait(state, where);
  } else {
    m.arrived = 0;
    m.turn ^= 1;
    m.once = true;
    for (int i = first; i < first + expected; ++i) cluster.threads[i].state = State::kReady;
  }
  order_acquire(token);
}

std::string mask_text(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

// Whether all lanes of the mask have arrived; an error where one of them never will.
bool all_arrived(Thread* warp, const Thread& t) {
  const Request& r = t.request;
  bool all = true;
  for (int lane = 0; lane < device::kWarp; ++lane) {
    const Thread& other = warp[lane];
    const bool named = r.mask >> lane & 1;
    if (named && other.state == State::kDone) {
      fail(name_of(t) + " calls " + kNames[int(r.kind)] + " at " + text_of(t.where) +
           " with a mask that names lane " + std::to_string(lane) + ", which has exited");
    }
    if (other.state != State::kCollective) {
      all = all && !named;
      continue;
    }
    const Request& o = other.request;
    const bool names_me = o.mask >> (t.thread % device::kWarp) & 1;
    if (!named && !names_me) continue;
    if (o.kind != r.kind || o.mask != r.mask || o.bytes != r.bytes || !same_place(other.where, t.where)) {
      fail(name_of(t) + " calls " + kNames[int(r.kind)] + " at " + text_of(t.where) + " with mask " +
           mask_text(r.mask) + " while lane " + std::to_string(lane) + " waits in " + kNames[int(o.kind)] + " at " +
           text_of(other.where) + " with mask " + mask_text(o.mask));
    }
  }
  return all;
}

void finish(Thread* warp, const Request& r) {
  uint32_t votes = 0;
  for (int lane = 0; lane < device::kWarp; ++lane) {
    if (r.mask >> lane & 1 && warp[lane].request.value) votes |= 1u << lane;
  }
  for (int lane = 0; lane < device::kWarp; ++lane) {
    if (!(r.mask >> lane & 1)) continue;
    warp[lane].result = r.kind == Collective::kBallot ? votes : warp[warp[lane].request.from].request.value;
    warp[lane].state = State::kReady;
  }
}

}  // namespace

void block_barrier(const Where& where) {
  const int threads = current_launch.grid.threads;
  Block& block = running_block();
  if (block.live < threads) fail("barrier in a block of which threads have exited", where);
  meet(block.meeting, self->rank * threads, threads, State::kBlockBarrier, where);
}

void cluster_barrier(const Where& where) {
  const int all = int(cluster.threads.size());
  if (cluster.live < all) fail("cluster_barrier in a cluster of which threads have exited", where);
  meet(cluster.meeting, 0, all, State::kClusterBarrier, where);
}

uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int bytes, int from, const Where& where) {
  Thread& t = running();
  const int lane = t.thread % device::kWarp;
  if (!(mask >> lane & 1))
    fail((std::string(kNames[int(kind)]) + " by a lane that its mask does not name").c_str(), where);
  if (from < 0 || from >= device::kWarp || (bytes && !(mask >> from & 1))) {
    fail("a shuffle from lane " + std::to_string(from) + ", which its mask " + mask_text(mask) +
         " does not name, by " + name_of(t) + " at " + text_of(where));
  }
  t.request = {kind, mask, value, bytes, from};
  t.state = State::kCollective;
  t.where = where;
  const int index = int(&t - cluster.threads.data());
  Thread* const warp = &cluster.threads[index - lane];
  const bool last = all_arrived(warp, t);
  // Shuffles and ballots do not order memory, on a GPU either.
  char* token = nullptr;
  if (kind == Collective::kWarpBarrier) {
    const int group = index - lane + __builtin_ctz(mask);
    token = cluster.warp_tokens[2 * group + cluster.warp_turns[group]];
    order_release(token);
    if (last) cluster.warp_turns[group] ^= 1;
  }
  if (last) {
    finish(warp, t.request);
  } else {
    wait(State::kCollective, where);
  }
  if (token) order_acquire(token);
  return t.result;
}

}  // namespace ft::simt
