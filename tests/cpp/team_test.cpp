// Teams: every member runs, barriers separate rounds, teams larger than the machine go on, and a
// call from inside a parallel region or a forked child runs alone.
#include "core/team.h"

#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "check.h"

namespace {

// Each round, every member reads what all the others wrote in the round before.
void test_rounds(int wanted, int rounds) {
  encdec::Barrier barrier;
  std::vector<int> value(static_cast<size_t>(wanted), 0);
  std::atomic<int> members{0}, wrong{0};
  auto body = [&](int rank, int size) {
    members.fetch_add(1);
    for (int round = 1; round <= rounds; ++round) {
      value[static_cast<size_t>(rank)] = round;
      barrier.wait(size);
      for (int i = 0; i < size; ++i) {
        if (value[static_cast<size_t>(i)] != round) wrong.fetch_add(1);
      }
      barrier.wait(size);
    }
  };
  encdec::run_team(wanted, body);
  CHECK_EQ(members.load(), wanted);
  CHECK_EQ(wrong.load(), 0);
}

int team_size() {
  std::atomic<int> seen{0};
  auto body = [&](int, int size) { seen.store(size); };
  encdec::run_team(2, body);
  return seen.load();
}

}  // namespace

void run_tests() {
  test_rounds(1, 100);
  test_rounds(2, 20000);
  test_rounds(4 * omp_get_num_procs(), 200);

#pragma omp parallel num_threads(2)
  CHECK_EQ(team_size(), 1);

  // Two threads with a team each.
  std::thread other([] { test_rounds(2, 500); });
  test_rounds(2, 500);
  other.join();

  CHECK_EQ(team_size(), 2);
  const pid_t child = fork();
  if (child == 0) _exit(team_size() == 1 ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
