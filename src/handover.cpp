// SPDX-License-Identifier: Apache-2.0
#include "handover.hpp"

#include "descriptor.hpp"
#include "shard.hpp"

#include <algorithm>
#include <boost/asio/error.hpp>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <msgtrans/handover.hpp>
#include <poll.h>
#include <string>
#include <string_view>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

extern char** environ;

namespace msgtrans {

using detail::Descriptor;

struct Successor::Core {
  pid_t process = -1;  // until it is known to have ended, or is ready
  pid_t started = -1;
  Descriptor ready;  // readable once it is ready, or gone
  Descriptor given_up;

  /// Not ready: it goes, and what it has accepted with it.
  void end() noexcept {
    if (process <= 0) return;
    ::kill(process, SIGKILL);
    while (::waitpid(process, nullptr, 0) < 0 && errno == EINTR) {
    }
    process = -1;
  }
  ~Core() { end(); }
};

namespace {

[[noreturn]] void fail(const std::string& what) {
  const error_code code(errno, boost::system::system_category());
  throw Exception(Error(code, what + ": " + code.message()));
}

/// As the shell finds it.
std::string find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) return name;
  const char* const path = std::getenv("PATH");
  std::string_view rest = path != nullptr ? path : "/usr/local/bin:/usr/bin:/bin";
  while (true) {
    const auto end = rest.find(':');
    const std::string_view directory = rest.substr(0, end);
    auto candidate = (directory.empty() ? std::string(".") : std::string(directory)) + "/" + name;
    if (::access(candidate.c_str(), X_OK) == 0) return candidate;
    if (end == std::string_view::npos) break;
    rest.remove_prefix(end + 1);
  }
  errno = ENOENT;
  fail("cannot start \"" + name + "\"");
}

constexpr int first_descriptor = 3;

/// Everything that the child needs, made before the fork: between fork and exec nothing may be allocated, since another
/// thread may have held the allocator.
class Launch {
 public:
  Launch(const std::vector<std::string>& command, const std::vector<ListeningSocket>& sockets, int ready)
      : program_(find_program(command.front())), words_(command) {
    const int count = static_cast<int>(sockets.size());
    // Out of the way of the numbers that they are to have.
    const auto keep = [&](int descriptor) {
      Descriptor copy(::fcntl(descriptor, F_DUPFD_CLOEXEC, first_descriptor + count + 1));
      if (!copy) fail("cannot duplicate a descriptor");
      copies_.push_back(std::move(copy));
    };
    std::string names, files;
    for (const auto& socket : sockets) {
      const int number = first_descriptor + static_cast<int>(copies_.size());
      keep(socket.descriptor());
      names += (names.empty() ? "" : ":") + (socket.name().empty() ? std::string("unknown") : socket.name());
      if (socket.owns_file()) files += (files.empty() ? "" : ",") + std::to_string(number);
    }
    keep(ready);
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string_view variable(*entry);
      const auto name = variable.substr(0, variable.find('='));
      if (!name.starts_with("LISTEN_") && name != detail::ready_variable && name != detail::files_variable) {
        variables_.emplace_back(variable);
      }
    }
    variables_.push_back("LISTEN_FDS=" + std::to_string(count));
    variables_.push_back("LISTEN_FDNAMES=" + names);
    variables_.push_back(std::string(detail::ready_variable) + "=" + std::to_string(first_descriptor + count));
    if (!files.empty()) variables_.push_back(std::string(detail::files_variable) + "=" + files);
    variables_.push_back("LISTEN_PID=" + std::string(digits, '\0'));
    for (auto& word : words_) arguments_.push_back(word.data());
    arguments_.push_back(nullptr);
    for (auto& variable : variables_) environment_.push_back(variable.data());
    environment_.push_back(nullptr);
    process_number_ = variables_.back().data() + std::string_view("LISTEN_PID=").size();
  }

  /// In the child. Returns only if it failed; with the reason in errno.
  void run(const sigset_t& mask) noexcept {
    for (std::size_t i = 0; i < copies_.size(); ++i) {
      // Without close-on-exec, which is the descriptor's and not copied.
      if (::dup2(copies_[i].get(), first_descriptor + static_cast<int>(i)) < 0) return;
    }
    std::to_chars(process_number_, process_number_ + digits, ::getpid());
    // What handlers of this process would do is not for the child, though the program could not yet be told.
    for (int number = 1; number < NSIG; ++number) {
      struct sigaction action {};
      if (::sigaction(number, nullptr, &action) != 0 || action.sa_handler == SIG_IGN) continue;
      action = {};
      action.sa_handler = SIG_DFL;
      ::sigaction(number, &action, nullptr);
    }
    ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
    ::execve(program_.c_str(), arguments_.data(), environment_.data());
  }

 private:
  static constexpr std::size_t digits = 20;

  std::string program_;
  std::vector<std::string> words_, variables_;
  std::vector<Descriptor> copies_;
  std::vector<char*> arguments_, environment_;
  char* process_number_ = nullptr;
};

std::pair<Descriptor, Descriptor> make_pipe() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) fail("cannot make a pipe");
  return {Descriptor(ends[0]), Descriptor(ends[1])};
}

}  // namespace

Successor Successor::start(const std::vector<std::string>& command, std::vector<ListeningSocket> sockets) {
  if (command.empty() || command.front().empty()) throw Exception(Error(Errc::invalid_option, "command is empty"));
  if (sockets.empty()) throw Exception(Error(Errc::invalid_option, "there is no socket to hand over"));
  for (const auto& socket : sockets) {
    if (socket.name().find(':') != std::string::npos) {
      throw Exception(Error(Errc::invalid_option, "a socket's name is \"" + socket.name() + "\", with a colon"));
    }
  }
  auto core = std::make_unique<Core>();
  core->given_up = Descriptor(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!core->given_up) fail("cannot make an eventfd");
  auto [ready, says_ready] = make_pipe();
  auto [failed, says_failed] = make_pipe();  // closed by the exec that succeeds
  core->ready = std::move(ready);
  Launch launch(command, sockets, says_ready.get());
  // Above the numbers that the child fills.
  Descriptor report(
      ::fcntl(says_failed.get(), F_DUPFD_CLOEXEC, first_descriptor + static_cast<int>(sockets.size()) + 1));
  if (!report) fail("cannot duplicate a descriptor");
  sigset_t all, mask;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &mask);
  const pid_t process = ::fork();
  if (process == 0) {
    launch.run(mask);
    const int why = errno;
    (void)!::write(report.get(), &why, sizeof why);
    ::_exit(127);
  }
  const int fork_failed = errno;
  ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  if (process < 0) {
    errno = fork_failed;
    fail("cannot start a process");
  }
  core->process = core->started = process;
  says_ready.reset();
  says_failed.reset();
  report.reset();
  int why = 0;
  ssize_t count = 0;
  while ((count = ::read(failed.get(), &why, sizeof why)) < 0 && errno == EINTR) {
  }
  if (count != 0) {
    core->end();
    errno = count == sizeof why ? why : EIO;
    fail("cannot start \"" + command.front() + "\"");
  }
  return Successor(std::move(core));
}

Successor::Successor(std::unique_ptr<Core> core) noexcept : core_(std::move(core)) {}
Successor::Successor(Successor&&) noexcept = default;
Successor& Successor::operator=(Successor&&) noexcept = default;
Successor::~Successor() = default;

pid_t Successor::process() const noexcept {
  return core_->started;
}

bool Successor::wait_ready(std::chrono::milliseconds within, Error& error) {
  error = {};
  if (detail::Shard::must_not_block()) {
    error = Error(Errc::blocking_on_shard, "wait_ready() would block a thread that runs handlers");
    return false;
  }
  const auto begun = std::chrono::steady_clock::now();
  within = std::clamp<std::chrono::milliseconds>(within, std::chrono::milliseconds{0}, detail::longest_duration);
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(begun + within - std::chrono::steady_clock::now());
    constexpr std::chrono::milliseconds an_hour = std::chrono::hours(1);
    pollfd entries[2] = {{core_->ready.get(), POLLIN, 0}, {core_->given_up.get(), POLLIN, 0}};
    const int found =
        ::poll(entries, 2, static_cast<int>(std::clamp(left, std::chrono::milliseconds{0}, an_hour).count()));
    if (found < 0 && errno != EINTR) {
      error = Error(error_code(errno, boost::system::system_category()));
      break;
    }
    if (found > 0 && entries[0].revents != 0) {
      char said = 0;
      const ssize_t count = ::read(core_->ready.get(), &said, 1);
      if (count < 0 && errno == EINTR) continue;
      if (count == 1) {
        core_->process = -1;  // whatever becomes of it, it is no longer ours
        core_->ready.reset();
        return true;
      }
      error = Error(Errc::closed, "the successor ended before it was ready");
      break;
    }
    if (found > 0) {
      error = Error(boost::asio::error::operation_aborted);
      break;
    }
    if (found == 0 && left.count() <= 0) {
      error = Error(make_error_code(boost::system::errc::timed_out),
                    "the successor was not ready within " + std::to_string(within.count()) + " ms");
      break;
    }
  }
  core_->end();
  return false;
}

void Successor::give_up() noexcept {
  const std::uint64_t one = 1;
  (void)!::write(core_->given_up.get(), &one, sizeof one);
}

namespace {

void tell_systemd() noexcept {
  const char* const where = std::getenv("NOTIFY_SOCKET");
  if (where == nullptr) return;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::size_t length = std::strlen(where);
  if ((where[0] != '/' && where[0] != '@') || length >= sizeof address.sun_path) return;
  std::memcpy(address.sun_path, where, length);
  auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length);
  if (where[0] == '@') {
    address.sun_path[0] = '\0';
  } else {
    ++size;
  }
  const Descriptor socket(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!socket) return;
  char text[64] = "READY=1\nMAINPID=";
  char* const digits = text + std::strlen(text);
  const char* const end = std::to_chars(digits, text + sizeof text, ::getpid()).ptr;
  (void)::sendto(socket.get(), text, static_cast<std::size_t>(end - text), MSG_NOSIGNAL,
                 reinterpret_cast<const sockaddr*>(&address), size);
}

}  // namespace

void announce_ready() noexcept {
  tell_systemd();
  const char* const text = std::getenv(detail::ready_variable);
  if (text == nullptr) return;
  int descriptor = -1;
  const char* const end = text + std::strlen(text);
  const auto parsed = std::from_chars(text, end, descriptor);
  ::unsetenv(detail::ready_variable);
  struct stat found {};
  // Whoever set it by mistake must not find some other descriptor written to.
  if (parsed.ptr != end || descriptor < 0 || ::fstat(descriptor, &found) != 0 || !S_ISFIFO(found.st_mode)) return;
  // A predecessor that has gone meanwhile does not make this process end.
  sigset_t pipe, mask;
  ::sigemptyset(&pipe);
  ::sigaddset(&pipe, SIGPIPE);
  ::pthread_sigmask(SIG_BLOCK, &pipe, &mask);
  if (::write(descriptor, "", 1) < 0 && errno == EPIPE && ::sigismember(&mask, SIGPIPE) == 0) {
    const timespec now{};
    (void)::sigtimedwait(&pipe, nullptr, &now);
  }
  ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  ::close(descriptor);
}

}  // namespace msgtrans
