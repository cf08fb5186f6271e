// SPDX-License-Identifier: Apache-2.0
#include "balancer.hpp"
#include "check_option.hpp"
#include "client.hpp"

#include <algorithm>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/system_executor.hpp>
#include <map>
#include <msgtrans/pool/health_checker.hpp>
#include <utility>

namespace msgtrans::detail {

namespace {

HealthCheckerOptions checked(HealthCheckerOptions options) {
  Error error = check_duration("interval", options.interval, false);
  if (!error) error = check_duration("timeout", options.timeout, false);
  constexpr unsigned most = 1000;
  for (const auto& [name, value] : {std::pair("rise", options.rise), std::pair("fall", options.fall)}) {
    if (!error) error = check_range(name, value, 1U, most);
  }
  if (!error && options.client.executor) {
    error = Error(Errc::invalid_option, "client.executor is set; a health checker runs on its balancer's executor");
  }
  if (!error && options.client.reconnect.enabled) {
    error = Error(Errc::invalid_option, "client.reconnect.enabled is set; a checker makes its connections itself");
  }
  if (!error) error = validate_connection(options.client);
  if (error) throw Exception(error);
  return options;
}

}  // namespace

/// What `HealthChecker` refers to. Members are for the executor unless marked.
class Checker final : public std::enable_shared_from_this<Checker> {
 public:
  Checker(std::shared_ptr<Balancer> balancer, HealthCheckerOptions options)
      : options_(checked(std::move(options))),
        balancer_(std::move(balancer)),
        shard_(std::make_shared<Shard>(balancer_->shard()->executor())) {}

  /// Any thread.
  void start() {
    shard_->start([](const std::exception_ptr&) {}, nullptr,
                  [weak = weak_from_this()] {
                    if (const auto self = weak.lock()) self->forget_all();
                  });
    shard_->post([self = shared_from_this()] { self->probe_all(); });
  }

  /// Any thread.
  void stop() {
    shard_->post([self = shared_from_this()] {
      self->forget_all();
      self->shard_->finish([] {});
    });
    user_calls_->silence();
  }

  /// Any thread.
  [[nodiscard]] std::vector<HealthStats> stats() const {
    const std::lock_guard lock(mutex_);
    std::vector<HealthStats> all;
    for (const auto& [url, target] : targets_) all.push_back(target->stats);
    return all;
  }

 private:
  struct Target {
    HealthStats stats;  // under the lock
    std::optional<ClientTransport> client;
    unsigned in_a_row = 0;  // that speak against what it is taken for
    bool under_way = false;
    bool forgotten = false;
  };
  using TargetPtr = std::shared_ptr<Target>;

  void forget(Target& target) noexcept {
    target.forgotten = true;
    target.client.reset();
  }
  void forget_all() noexcept {
    stopped_ = true;
    const std::lock_guard lock(mutex_);
    for (const auto& [url, target] : targets_) forget(*target);
    targets_.clear();
  }

  void probe_all() {
    if (stopped_) return;
    shard_->run_at(Clock::now() + options_.interval, [weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->probe_all();
    });
    const auto now = balancer_->endpoints();
    std::vector<TargetPtr> due;
    {
      const std::lock_guard lock(mutex_);
      std::erase_if(targets_, [&](const auto& entry) {
        const bool there = !balancer_->is_closed() &&
                           std::any_of(now->all.begin(), now->all.end(),
                                       [&entry](const auto& endpoint) { return endpoint->url() == entry.first; });
        if (!there) forget(*entry.second);
        return !there;
      });
      if (balancer_->is_closed()) return;
      for (const auto& endpoint : now->all) {
        auto& target = targets_[endpoint->url()];
        if (!target) {
          target = std::make_shared<Target>();
          target->stats.url = endpoint->url();
          target->stats.healthy = endpoint->healthy.load();
        }
        if (!target->under_way) due.push_back(target);
      }
    }
    for (const auto& target : due) probe(target);
  }

  void probe(const TargetPtr& target) {
    target->under_way = true;
    try {
      if (target->client && target->client->is_connected()) return ask(target);
      target->client.reset();
      ClientOptions options = options_.client;
      options.executor = shard_->executor();
      options.connect_timeout = options_.timeout;
      target->client.emplace(std::move(options));
      target->client->async_connect(
          target->stats.url,
          asio::bind_executor(asio::system_executor(), [self = shared_from_this(), target](error_code code) {
            if (target->forgotten) return;
            if (code) return self->note(target, code);
            self->ask(target);
          }));
    } catch (const std::bad_alloc&) {
      note(target, make_error_code(boost::system::errc::not_enough_memory));
    }
  }

  void ask(const TargetPtr& target) {
    target->client->async_request(
        options_.payload, {.biz_type = options_.biz_type, .timeout = options_.timeout},
        asio::bind_executor(asio::system_executor(),
                            [self = shared_from_this(), target](error_code code, const Reply& reply) {
                              if (target->forgotten) return;
                              self->note(target, code ? code : self->judge(reply));
                            }));
  }

  [[nodiscard]] error_code judge(const Reply& reply) noexcept {
    if (!options_.accept) return {};
    const UserCalls::Entry entry(*user_calls_);
    if (!entry) return {};
    try {
      return options_.accept(reply) ? error_code() : make_error_code(Errc::refused);
    } catch (...) {
      return Errc::handler_failed;
    }
  }

  /// A probe has ended.
  void note(const TargetPtr& target, error_code code) {
    target->under_way = false;
    if (code) target->client.reset();  // whatever is wrong with it, the next probe begins anew
    bool changed = false;
    bool healthy = false;
    {
      const std::lock_guard lock(mutex_);
      HealthStats& stats = target->stats;
      ++stats.probes;
      if (code) ++stats.failed;
      if (stats.healthy == !code) {
        target->in_a_row = 0;
      } else if (++target->in_a_row >= (stats.healthy ? options_.fall : options_.rise)) {
        target->in_a_row = 0;
        stats.healthy = !stats.healthy;
        ++(stats.healthy ? stats.ups : stats.downs);
        changed = true;
      }
      healthy = stats.healthy;
    }
    if (!changed || !balancer_->set_healthy(target->stats.url, healthy)) return;
    const auto loop = balancer_->loop();
    if (!loop) return;
    loop->announce({.kind = healthy ? EventKind::endpoint_up : EventKind::endpoint_down,
                    .subject = target->stats.url,
                    .error = healthy ? Error() : Error(code)});
  }

  const HealthCheckerOptions options_;
  const std::shared_ptr<Balancer> balancer_;
  const std::shared_ptr<Shard> shard_;
  const std::shared_ptr<UserCalls> user_calls_ = std::make_shared<UserCalls>();
  bool stopped_ = false;
  mutable std::mutex mutex_;
  std::map<std::string, TargetPtr> targets_;  // under the lock
};

}  // namespace msgtrans::detail

namespace msgtrans {

HealthChecker::HealthChecker(LoadBalancer& balancer, HealthCheckerOptions options)
    : checker_(std::make_shared<detail::Checker>(balancer.impl(), std::move(options))) {
  checker_->start();
}

HealthChecker::~HealthChecker() {
  checker_->stop();
}

std::vector<HealthStats> HealthChecker::stats() const {
  return checker_->stats();
}

}  // namespace msgtrans
