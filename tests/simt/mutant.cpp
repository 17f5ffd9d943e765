// Which mutant runs, and the census.
#include "simt/mutant.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace ft::mutant {

namespace {

constexpr int kMost = 4096;
bool reached[kMost], differed[kMost];

int told() {
  const char* const text = std::getenv("FT_MUTANT");
  if (!text) return -1;
  return std::strcmp(text, "census") == 0 ? kCensus : std::atoi(text);
}

struct AtExit {
  ~AtExit() {
    if (active != kCensus) return;
    for (int id = 0; id < kMost; ++id) {
      if (reached[id]) std::printf("mutant %d %s\n", id, differed[id] ? "differs" : "reached");
    }
    std::printf("seconds %.1f\n", double(std::clock()) / CLOCKS_PER_SEC);
  }
} at_exit;

}  // namespace

extern const int active = told();

void note(int id, bool differs) {
  reached[id] = true;
  if (differs) differed[id] = true;
}

}  // namespace ft::mutant
