// SPDX-License-Identifier: Apache-2.0
#include "balancer.hpp"
#include "check_option.hpp"

#include <algorithm>
#include <boost/asio/error.hpp>
#include <utility>

namespace msgtrans {

const char* to_string(Balance balance) noexcept {
  switch (balance) {
    case Balance::round_robin: return "round_robin";
    case Balance::least_loaded: return "least_loaded";
    case Balance::consistent_hash: return "consistent_hash";
  }
  return "?";
}

}  // namespace msgtrans

namespace msgtrans::detail {

namespace {

Error already_there(std::string_view url) {
  return Error(Errc::invalid_option, "the endpoint " + std::string(url) + " is there already");
}

Error check(const LoadBalancerOptions& options) {
  constexpr std::size_t most_nodes = 10'000;
  if (options.balance > Balance::consistent_hash) {
    return Error(Errc::invalid_option, "balance is " + std::to_string(static_cast<int>(options.balance)));
  }
  if (auto error = check_range<std::size_t>("virtual_nodes", options.virtual_nodes, 1, most_nodes)) return error;
  if (!options.pool.url.empty() || options.pool.executor || options.pool.control) {
    return Error(Errc::invalid_option,
                 "pool.url, pool.executor or pool.control is set; the balancer's own urls, executor and control count");
  }
  for (auto url = options.urls.begin(); url != options.urls.end(); ++url) {
    Error error;
    if (!parse_url(*url, error)) return error;
    if (std::find(options.urls.begin(), url, *url) != url) return already_there(*url);
  }
  // Also if there is no endpoint yet.
  ConnectionPoolOptions pool = options.pool;
  pool.url = "tcp://127.0.0.1:1";
  return validate(pool);
}

LoadBalancerOptions checked(LoadBalancerOptions options) {
  if (Error error = check(options)) throw Exception(error);
  return options;
}

class BalancedRequest final : public PoolRequest {
 public:
  BalancedRequest(std::shared_ptr<Balancer> by, BytesView payload, const RequestOptions& options, std::string_view key)
      : PoolRequest(payload, options), balancer_(std::move(by)), turn_(balancer_->next_turn()) {
    if (!key.empty()) key_ = HashRing::hash(key);
  }

 private:
  std::shared_ptr<Pool> next(bool& patient) override {
    // Elsewhere it may find a connection sooner than here.
    patient = false;
    if (endpoint_) tried_.push_back(std::move(endpoint_));
    endpoint_ = balancer_->is_closed() ? nullptr : balancer_->choose_endpoint(turn_, key_, tried_);
    return endpoint_ ? endpoint_->pool->impl() : nullptr;
  }
  [[nodiscard]] error_code nobody() const noexcept override {
    return balancer_->is_closed() ? Errc::closed : Errc::not_found;
  }
  void note(bool sent, error_code code) noexcept override {
    if (!sent) {
      endpoint_->passed.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    endpoint_->requests.fetch_add(1, std::memory_order_relaxed);
    if (code) endpoint_->failed.fetch_add(1, std::memory_order_relaxed);
  }
  [[nodiscard]] const std::shared_ptr<Shard>& home() const noexcept override { return balancer_->shard(); }
  [[nodiscard]] bool home_has_ended() const noexcept override { return balancer_->has_ended(); }

  const std::shared_ptr<Balancer> balancer_;
  const std::uint64_t turn_;
  std::optional<std::uint64_t> key_;
  EndpointPtr endpoint_;
  std::vector<EndpointPtr> tried_;
};

}  // namespace

EndpointStats BalancedEndpoint::stats() const {
  EndpointStats stats;
  stats.url = url();
  stats.healthy = healthy.load();
  stats.requests = requests.load(std::memory_order_relaxed);
  stats.failed = failed.load(std::memory_order_relaxed);
  stats.passed = passed.load(std::memory_order_relaxed);
  stats.pool = pool->stats();
  return stats;
}

Balancer::Balancer(LoadBalancerOptions options)
    : options_(checked(std::move(options))),
      shard_(options_.executor ? std::make_shared<Shard>(options_.executor) : std::make_shared<Shard>()),
      owns_loop_(!options_.control),
      loop_(options_.control ? options_.control->loop()
                             : std::make_shared<ControlLoop>(shard_->executor(), ControlLoop::Runs::on_executor,
                                                             ControlLoop::default_event_capacity, shard_)) {
  replace({});
}

void Balancer::start() {
  if (owns_loop_) loop_->start();
  shard_->start([](const std::exception_ptr&) {}, nullptr,
                [weak = weak_from_this()] {
                  // The context of the user's executor is being destroyed; the pools see to their own ends.
                  const auto self = weak.lock();
                  if (!self) return;
                  self->closed_.store(true);
                  self->finishing_.store(true);
                  std::shared_ptr<ControlLoop> gone;
                  {
                    const std::lock_guard lock(self->mutex_);
                    gone.swap(self->loop_);
                  }
                  self->set_finished();
                });
  try {
    for (const auto& url : options_.urls) add(url);
  } catch (...) {
    destroy();
    throw;
  }
}

EndpointPtr Balancer::make_endpoint(std::string_view url) const {
  ConnectionPoolOptions options = options_.pool;
  options.url = url;
  options.executor = shard_->executor();
  options.control.emplace(loop_);
  return std::make_shared<BalancedEndpoint>(std::move(options));
}

/// With the lock, but for the constructor.
void Balancer::replace(std::vector<EndpointPtr> all) {
  std::vector<std::string> names;
  for (const auto& endpoint : all) names.push_back(endpoint->url());
  const bool needs_ring = options_.balance == Balance::consistent_hash;
  endpoints_ = std::make_shared<const Endpoints>(
      Endpoints{std::move(all), HashRing(names, needs_ring ? options_.virtual_nodes : 0)});
}

void Balancer::add(std::string_view url) {
  Error error;
  if (!parse_url(url, error)) throw Exception(error);
  const std::lock_guard lock(mutex_);
  if (closed_.load()) throw Exception(Error(Errc::closed, "the load balancer was closed"));
  auto all = endpoints_->all;
  for (const auto& endpoint : all) {
    if (endpoint->url() == url) throw Exception(already_there(url));
  }
  all.push_back(make_endpoint(url));
  replace(std::move(all));
}

bool Balancer::remove(std::string_view url) {
  EndpointPtr gone;
  {
    const std::lock_guard lock(mutex_);
    auto all = endpoints_->all;
    const auto found = std::find_if(all.begin(), all.end(), [url](const auto& at) { return at->url() == url; });
    if (found == all.end()) return false;
    gone = *found;
    all.erase(found);
    leaving_.push_back(gone);
    replace(std::move(all));
  }
  gone->pool->close();
  return true;
}

bool Balancer::set_healthy(std::string_view url, bool healthy) {
  const auto now = endpoints();
  for (const auto& endpoint : now->all) {
    if (endpoint->url() != url) continue;
    endpoint->healthy.store(healthy);
    return true;
  }
  return false;
}

std::shared_ptr<const Balancer::Endpoints> Balancer::endpoints() const {
  const std::lock_guard lock(mutex_);
  return endpoints_;
}

EndpointPtr Balancer::choose_endpoint(std::uint64_t turn, std::optional<std::uint64_t> key,
                                      const std::vector<EndpointPtr>& tried) const {
  const auto now = endpoints();
  const auto& all = now->all;
  const bool trust = std::any_of(all.begin(), all.end(), [](const auto& at) { return at->healthy.load(); });
  const auto usable = [&](std::size_t i) {
    return (!trust || all[i]->healthy.load()) && std::find(tried.begin(), tried.end(), all[i]) == tried.end();
  };
  const auto load = [&](std::size_t i) { return all[i]->pool->impl()->load(); };
  const auto found = choose(options_.balance, all.size(), turn, usable, load, now->ring, key);
  return found ? all[*found] : nullptr;
}

void Balancer::close() {
  closed_.store(true);
  for (const auto& endpoint : endpoints()->all) endpoint->pool->close();
}

void Balancer::destroy() {
  closed_.store(true);
  std::vector<EndpointPtr> all;
  {
    const std::lock_guard lock(mutex_);
    all = endpoints_->all;
    all.insert(all.end(), leaving_.begin(), leaving_.end());
    leaving_.clear();
    pools_left_ = all.size() + 1;
  }
  for (const auto& endpoint : all) {
    endpoint->pool->impl()->destroy([self = shared_from_this()] { self->pool_finished(); });
  }
  pool_finished();
  const bool own_thread = !options_.executor;
  if (!own_thread || Shard::must_not_block()) return;
  // Behind what the pools do now.
  shard_->post([self = shared_from_this(), all] {
    const bool users =
        std::any_of(all.begin(), all.end(), [](const auto& at) { return at->pool->impl()->users() != 0; });
    const std::lock_guard lock(self->mutex_);
    self->left_to_users_ = users;
    self->changed_.notify_all();
  });
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return finished_ || left_to_users_; });
  const bool over = finished_;
  lock.unlock();
  if (over) shard_->join();
}

void Balancer::pool_finished() noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (--pools_left_ != 0) return;
  }
  finish();
}

void Balancer::finish() noexcept {
  if (finishing_.exchange(true)) return;
  // The pools' shards have a turn to go.
  constexpr int turns = 2;
  finish_after_turns(
      shard_, turns, [self = shared_from_this()] { return self->owns_loop_ ? self->loop() : nullptr; },
      [self = shared_from_this()] { self->set_finished(); });
}

void Balancer::set_finished() {
  const std::lock_guard lock(mutex_);
  finished_ = true;
  changed_.notify_all();
}

LoadBalancerStats Balancer::stats() const {
  LoadBalancerStats stats;
  for (const auto& endpoint : endpoints()->all) stats.endpoints.push_back(endpoint->stats());
  std::vector<EndpointPtr> gone;  // destroyed without the lock
  {
    const std::lock_guard lock(mutex_);
    const auto left = std::partition(leaving_.begin(), leaving_.end(),
                                     [](const auto& endpoint) { return !endpoint->pool->impl()->has_ended(); });
    gone.assign(left, leaving_.end());
    leaving_.erase(left, leaving_.end());
    stats.leaving = leaving_.size();
  }
  return stats;
}

PoolRequestPtr make_request(const std::shared_ptr<Balancer>& balancer, BytesView payload, const RequestOptions& options,
                            std::string_view key) {
  return PoolRequestPtr(new BalancedRequest(balancer, payload, options, key));
}

}  // namespace msgtrans::detail

namespace msgtrans {

LoadBalancer::LoadBalancer(LoadBalancerOptions options)
    : balancer_(std::make_shared<detail::Balancer>(std::move(options))) {
  balancer_->start();
}

LoadBalancer::~LoadBalancer() {
  balancer_->destroy();
}

void LoadBalancer::add(std::string_view url) {
  balancer_->add(url);
}
bool LoadBalancer::remove(std::string_view url) {
  return balancer_->remove(url);
}
bool LoadBalancer::set_healthy(std::string_view url, bool healthy) {
  return balancer_->set_healthy(url, healthy);
}

std::shared_ptr<ConnectionPool> LoadBalancer::pick(std::string_view key) {
  std::optional<std::uint64_t> hash;
  if (!key.empty()) hash = detail::HashRing::hash(key);
  const auto endpoint = balancer_->choose_endpoint(balancer_->next_turn(), hash, {});
  return endpoint ? endpoint->pool : nullptr;
}

Reply LoadBalancer::request(BytesView payload, const RequestOptions& options, std::string_view key) {
  Error error;
  Reply reply = request(payload, options, key, error);
  if (error) throw Exception(error);
  return reply;
}

Reply LoadBalancer::request(BytesView payload, const RequestOptions& options, std::string_view key, Error& error) {
  return detail::wait_for_reply(
      [&](detail::ReplyHandler handler) {
        detail::start_request(detail::make_request(balancer_, payload, options, key), std::move(handler));
      },
      "request() would block a thread that runs handlers; use async_request", error);
}

void LoadBalancer::close() {
  balancer_->close();
}
LoadBalancerStats LoadBalancer::stats() const {
  return balancer_->stats();
}
Subscription<Event> LoadBalancer::subscribe() {
  const auto loop = balancer_->loop();
  if (!loop) throw Exception(Error(Errc::closed, "the context of the balancer's executor has gone"));
  return loop->subscribe();
}
detail::asio::any_io_executor LoadBalancer::get_executor() const noexcept {
  return balancer_->shard()->executor();
}

}  // namespace msgtrans
