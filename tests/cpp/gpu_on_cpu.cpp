// The scheduler of gpu_on_cpu.h.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/gpu.cuh"
#include "core/gpu_launch.cuh"

namespace encdec::gpu {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace cpu {
namespace {

constexpr size_t kStack = 64 << 10, kPage = 4096;
constexpr int kMessageWords = 6;  // of the fragments that one lane gives to a multiplication

char* map(size_t bytes) {
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("gpu_on_cpu: there is no memory");
  return static_cast<char*>(memory);
}

struct Block;

struct Store {
  void* to;
  Quad value;
  int bytes;
};

struct Thread {
  jmp_buf context;
  bool started = false, asleep = false;
  Index thread, block_index;
  Block* block = nullptr;
  int number = 0;             // in its block
  std::vector<Store> stores;  // in order
  size_t released = 0;        // of them
  std::vector<size_t> known;  // of each thread's stores: ordered before now
  uint64_t acquired = 0;      // what was in memory at this time is seen
  std::vector<std::pair<void*, const void*>> copies;
};

// Threads that wait for each other.
struct Meeting {
  std::vector<Thread*> there;
};

struct Warp {
  Meeting meeting;
  uint32_t words[2][kWarp][kMessageWords];
  int turn[kWarp] = {};
};

struct Block {
  char* memory = nullptr;  // shared
  size_t mapped = 0;
  char* mapping = nullptr;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  Meeting meetings[16];
  std::vector<Block*> cluster;
  Meeting* cluster_meeting = nullptr;
  ~Block() {
    if (mapping != nullptr) munmap(mapping, mapped);
  }
};

struct Message {
  Quad* to;
  Quad value;
  Mbarrier* barrier;
};

class Stacks {
 public:
  char* at(size_t i) {
    while (stacks_.size() <= i) stacks_.push_back(map(kStack));
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;  // kept for all launches
};

Stacks stacks;

class Machine {
 public:
  Machine(const Launch& launch, const std::function<void()>& kernel);
  void run();

  void wait_at(Meeting& meeting, size_t count, bool orders);
  void yield();
  void fail(const std::string& what) {
    if (failure_.empty()) failure_ = what;
    yield();  // never to return
  }
  bool left_out(Site site, const char* how = "");
  uint32_t random(uint32_t n) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<uint32_t>((state_ >> 16) % n);
  }

  Thread* current = nullptr;
  const std::function<void()>& kernel;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Message> messages;
  uint64_t now = 0;
  std::unordered_map<const void*, std::vector<std::pair<uint64_t, Quad>>> history;
  bool polled = false;

 private:
  static void enter();
  void resume(Thread& thread);
  void deliver();
  void choose_sleepers();

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::unique_ptr<Meeting>> cluster_meetings_;
  std::vector<Thread*> ready_;
  jmp_buf scheduler_;
  std::string failure_;
  uint64_t state_;
  uint32_t until_sleep_ = 0;
};

Machine* machine = nullptr;

Machine::Machine(const Launch& launch, const std::function<void()>& kernel)
    : kernel(kernel), state_(options().seed * 0x9e3779b97f4a7c15ull | 1) {
  const unsigned n[3] = {static_cast<unsigned>(launch.grid[0]),
                         static_cast<unsigned>(launch.grid[1]),
                         static_cast<unsigned>(launch.grid[2])};
  gridDim = {n[0], n[1], n[2]};
  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
  for (unsigned z = 0; z < n[2]; ++z) {
    for (unsigned y = 0; y < n[1]; ++y) {
      for (unsigned x = 0; x < n[0]; ++x) {
        blocks.push_back(std::make_unique<Block>());
        Block& block = *blocks.back();
        const size_t bytes = static_cast<size_t>(launch.shared_bytes);
        const size_t pages = (bytes + kPage - 1) / kPage * kPage;
        block.mapped = pages + kPage;
        block.mapping = map(block.mapped);
        mprotect(block.mapping + pages, kPage, PROT_NONE);
        block.memory = block.mapping + (pages - bytes) / 128 * 128;
        std::memset(block.mapping, 0xff, pages);
        block.warps.resize(static_cast<size_t>((launch.threads + kWarp - 1) / kWarp));
        for (int i = 0; i < launch.threads; ++i) {
          threads_.push_back(std::make_unique<Thread>());
          Thread& thread = *threads_.back();
          thread.thread = {static_cast<unsigned>(i), 0, 0};
          thread.block_index = {x, y, z};
          thread.block = &block;
          thread.number = i;
          thread.known.resize(static_cast<size_t>(launch.threads));
          block.threads.push_back(&thread);
          ready_.push_back(&thread);
        }
        if (launch.cluster > 0) {
          const unsigned rank = x % static_cast<unsigned>(launch.cluster);
          if (rank == 0) cluster_meetings_.push_back(std::make_unique<Meeting>());
          const size_t first = blocks.size() - 1 - rank;
          for (size_t i = first; i < blocks.size(); ++i) blocks[i]->cluster.clear();
          for (size_t i = first; i < blocks.size(); ++i) {
            for (size_t j = first; j < blocks.size(); ++j) {
              blocks[i]->cluster.push_back(blocks[j].get());
            }
            blocks[i]->cluster_meeting = cluster_meetings_.back().get();
          }
        }
      }
    }
  }
}

void Machine::enter() {
  machine->kernel();
  // Done: out of the list of those who are ready.
  auto& ready = machine->ready_;
  ready.erase(std::find(ready.begin(), ready.end(), machine->current));
  machine->yield();
}

__attribute__((noinline)) void Machine::resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.thread;
  blockIdx = thread.block_index;
  if (_setjmp(scheduler_) != 0) return;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  const size_t index = static_cast<size_t>(
      std::find_if(threads_.begin(), threads_.end(), [&](auto& t) { return t.get() == &thread; }) -
      threads_.begin());
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks.at(index);
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, &Machine::enter, 0);
  setcontext(&context);
}

__attribute__((noinline)) void Machine::yield() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler_, 1);
}

void Machine::deliver() {
  const size_t i = random(static_cast<uint32_t>(messages.size()));
  const Message message = messages[i];
  messages[i] = messages.back();
  messages.pop_back();
  *message.to = message.value;
  MbarrierState& state = state_of(message.barrier);
  state.bytes -= static_cast<int32_t>(sizeof(Quad));
  if (state.bytes == 0 && state.arrivals == 0)
    state = {0, 1, static_cast<uint16_t>(state.phase + 1)};
}

// For a while, one warp, one block or nobody.
void Machine::choose_sleepers() {
  until_sleep_ = 20 + random(static_cast<uint32_t>(256 * threads_.size()));
  for (auto& thread : threads_) thread->asleep = false;
  const Block& block = *blocks[random(static_cast<uint32_t>(blocks.size()))];
  const uint32_t kind = random(3), warp = random(static_cast<uint32_t>(block.warps.size()));
  for (Thread* thread : block.threads) {
    thread->asleep = kind == 1 || (kind == 2 && thread->number / kWarp == static_cast<int>(warp));
  }
}

void Machine::run() {
  size_t idle = 0;  // turns in a row in which a thread only looked
  while (!ready_.empty() && failure_.empty()) {
    if (until_sleep_-- == 0) choose_sleepers();
    if (!messages.empty() && random(4) == 0) deliver(), idle = 0;
    Thread* chosen = nullptr;
    for (int tries = 0; tries < 16 && (chosen == nullptr || (chosen->asleep && idle < 64));
         ++tries) {
      chosen = ready_[random(static_cast<uint32_t>(ready_.size()))];
    }
    polled = false;
    resume(*chosen);
    idle = polled ? idle + 1 : 0;
    if (idle > 64 * (1 + ready_.size()) && messages.empty()) failure_ = "everybody waits";
  }
  for (const auto& thread : threads_) {
    const bool waits =
        failure_.empty() && ready_.empty() &&
        std::any_of(blocks.begin(), blocks.end(), [&](const auto& block) {
          return std::any_of(std::begin(block->meetings), std::end(block->meetings),
                             [](const Meeting& m) { return !m.there.empty(); }) ||
                 std::any_of(block->warps.begin(), block->warps.end(),
                             [](const Warp& w) { return !w.meeting.there.empty(); }) ||
                 (block->cluster_meeting != nullptr && !block->cluster_meeting->there.empty());
        });
    if (waits) failure_ = "threads wait for some that have ended";
    (void)thread;
    break;
  }
  if (failure_.empty() && !messages.empty()) failure_ = "a store came to a block that has ended";
  if (!failure_.empty()) throw std::runtime_error("gpu_on_cpu: " + failure_);
}

void Machine::wait_at(Meeting& meeting, size_t count, bool orders) {
  meeting.there.push_back(current);
  if (meeting.there.size() < count) {
    ready_.erase(std::find(ready_.begin(), ready_.end(), current));
    yield();
    return;
  }
  const std::vector<Thread*> there = std::move(meeting.there);
  meeting.there.clear();
  if (orders) {
    // All that any of them had done or seen is ordered before what each does from here.
    uint64_t acquired = 0;
    std::unordered_map<Block*, std::vector<size_t>> known;
    for (Thread* t : there) {
      acquired = std::max(acquired, t->acquired);
      t->known[static_cast<size_t>(t->number)] = t->stores.size();
      std::vector<size_t>& all = known[t->block];
      all.resize(t->known.size());
      for (size_t i = 0; i < all.size(); ++i) all[i] = std::max(all[i], t->known[i]);
    }
    for (Thread* t : there) {
      t->acquired = acquired;
      t->known = known[t->block];
    }
  }
  for (Thread* t : there) {
    if (t != current) ready_.push_back(t);
  }
  yield();
}

bool Machine::left_out(Site site, const char* how) {
  const char* const slash = std::strrchr(site.file, '/');
  const std::string name =
      std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line) + how;
  options().sites.insert(name);
  return options().mutation == name;
}

}  // namespace

Options& options() {
  static Options own;
  return own;
}

std::set<std::string> not_needed(const std::function<bool()>& right, int orders) {
  options() = {};
  if (!right()) throw std::runtime_error("gpu_on_cpu: it is wrong with everything in its place");
  const std::set<std::string> sites = options().sites;
  std::set<std::string> found;
  for (const std::string& site : sites) {
    bool seen = false;
    for (int order = 0; order < orders && !seen; ++order) {
      options().mutation = site;
      options().seed = 200 + static_cast<uint64_t>(order);
      try {
        seen = !right();
      } catch (const std::runtime_error&) {
        seen = true;
      }
    }
    if (!seen) found.insert(site);
  }
  options() = {};
  options().sites = sites;
  return found;
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  Machine own(launch, kernel);
  machine = &own;
  try {
    own.run();
  } catch (...) {
    machine = nullptr;
    throw;
  }
  machine = nullptr;
}

char* shared_memory() { return machine->current->block->memory; }

void barrier(int id, int threads, Site site) {
  if (machine->left_out(site)) return;
  if (id < 0 || id > 15) machine->fail("there are barriers 0 to 15");
  Meeting& meeting = machine->current->block->meetings[id];
  machine->wait_at(meeting, static_cast<size_t>(threads), true);
}

void cluster_barrier(Site site) {
  if (machine->left_out(site)) return;
  const Block& block = *machine->current->block;
  machine->wait_at(*block.cluster_meeting, block.cluster.size() * block.threads.size(), true);
}

void release(Site site) {
  if (machine->left_out(site)) return;
  Thread& own = *machine->current;
  own.known[static_cast<size_t>(own.number)] = own.stores.size();
  ++machine->now;
  for (Thread* thread : own.block->threads) {
    const size_t end = own.known[static_cast<size_t>(thread->number)];
    for (; thread->released < end; ++thread->released) {
      const Store& store = thread->stores[thread->released];
      auto& versions = machine->history[store.to];
      Quad before{};
      std::memcpy(&before, store.to, static_cast<size_t>(store.bytes));
      if (versions.empty()) versions.push_back({0, before});
      versions.push_back({machine->now, store.value});
      std::memcpy(store.to, &store.value, static_cast<size_t>(store.bytes));
    }
  }
  machine->yield();
}

void store(void* to, Quad value, int bytes) {
  machine->current->stores.push_back({to, value, bytes});
}

// The last version that this thread must see, or any later one; its own, if it has one.
Quad load(const void* from, int bytes) {
  const Thread& own = *machine->current;
  for (size_t i = own.stores.size(); i > own.released; --i) {
    if (own.stores[i - 1].to == from) return own.stores[i - 1].value;
  }
  Quad value{};
  std::memcpy(&value, from, static_cast<size_t>(bytes));
  const auto found = machine->history.find(from);
  if (found == machine->history.end()) return value;
  const auto& versions = found->second;
  size_t oldest = versions.size() - 1;
  while (oldest > 0 && versions[oldest].first > own.acquired) --oldest;
  const size_t count = versions.size() - oldest;
  return versions[oldest + machine->random(static_cast<uint32_t>(count))].second;
}

void copy(void* to, const void* from) { machine->current->copies.push_back({to, from}); }

void finish_copies(Site site) {
  if (machine->left_out(site)) return;
  Thread& own = *machine->current;
  for (const auto& [to, from] : own.copies) {
    *static_cast<Quad*>(to) = load(from, sizeof(Quad));
  }
  own.copies.clear();
}

void wait_until(const std::function<bool()>& done, bool acquires, Site site) {
  if (machine->left_out(site)) return;
  const bool relaxed = acquires && machine->left_out(site, " relaxed");
  while (!done()) {
    machine->polled = true;
    machine->yield();
  }
  if (acquires && !relaxed) machine->current->acquired = machine->now;
}

void expect(Mbarrier* barrier, uint32_t bytes, Site site) {
  if (machine->left_out(site)) return;
  MbarrierState& state = state_of(barrier);
  if (state.arrivals != 1) machine->fail("a barrier's phase was told twice what to expect");
  state.bytes += static_cast<int32_t>(bytes);
  state.arrivals = 0;
  if (state.bytes == 0) state = {0, 1, static_cast<uint16_t>(state.phase + 1)};
}

void send(Quad* to, Quad value, Mbarrier* barrier, uint32_t rank) {
  const Block& own = *machine->current->block;
  if (rank >= own.cluster.size()) machine->fail("there is no block of that rank in the cluster");
  char* const there = own.cluster[rank]->memory;
  const auto same = [&](void* p) { return there + (static_cast<char*>(p) - own.memory); };
  machine->messages.push_back(
      {reinterpret_cast<Quad*>(same(to)), value, reinterpret_cast<Mbarrier*>(same(barrier))});
}

int lane() { return machine->current->number % kWarp; }

const uint32_t* meet(const uint32_t* words, int count) {
  Thread& own = *machine->current;
  Warp& warp = own.block->warps[static_cast<size_t>(own.number / kWarp)];
  // Two turns are kept: a lane that is ahead writes where nobody reads any more.
  const int turn = warp.turn[lane()] ^= 1;
  std::memcpy(warp.words[turn][lane()], words, static_cast<size_t>(count) * 4);
  machine->wait_at(warp.meeting, kWarp, false);
  static uint32_t found[kWarp * kMessageWords];
  for (int i = 0; i < kWarp; ++i) {
    std::memcpy(found + i * count, warp.words[turn][i], static_cast<size_t>(count) * 4);
  }
  return found;
}

}  // namespace cpu

namespace {

// d += a b' of the fragments of all lanes; at(word, i): number i of a word, `numbers` to a word.
template <class At>
void multiply_tile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int numbers,
                   At at) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t* const all = cpu::meet(words, 6);
  const int lane = cpu::lane(), half = 4 * numbers;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 2 * half; ++k) {
      const int k_lane = k % half / numbers, upper = k / half;
      const uint32_t of_a = all[(row % 8 * 4 + k_lane) * 6 + row / 8 + 2 * upper];
      const uint32_t of_b = all[(column * 4 + k_lane) * 6 + 4 + upper];
      sum += at(of_a, k % numbers) * at(of_b, k % numbers);
    }
    d[i] += sum;
  }
}

uint16_t half_of(uint32_t word, int i) { return static_cast<uint16_t>(word >> (16 * i)); }

}  // namespace

template <>
void multiply<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  // What is below TF32's precision is not read.
  multiply_tile(d, a, b, 1, [](uint32_t word, int) { return bits_to_float(word & ~0x1fffu); });
}
template <>
void multiply<Bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_tile(d, a, b, 2,
                [](uint32_t word, int i) { return to_float(Bfloat16{half_of(word, i)}); });
}
template <>
void multiply<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_tile(d, a, b, 2,
                [](uint32_t word, int i) { return to_float(Float16{half_of(word, i)}); });
}

float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31,
                 mantissa = x.bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : bits_to_float((exponent + 112) << 23 | mantissa << 13);
  return sign != 0 ? -size : size;
}

template <>
Bfloat16 from_float<Bfloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
Float16 from_float<Float16>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size == 0.0f) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // The distance between neighbours there; nearbyint rounds ties to even.
  int exponent;
  std::frexp(size, &exponent);
  const int step = std::max(exponent - 11, -24);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -step)));
  if (step == -24) return {static_cast<uint16_t>(sign | units)};
  return {static_cast<uint16_t>(sign | ((static_cast<uint32_t>(step + 25) << 10) + units - 1024))};
}

}  // namespace encdec::gpu
