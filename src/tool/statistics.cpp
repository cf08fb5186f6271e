// SPDX-License-Identifier: Apache-2.0
#include "statistics.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

namespace msgtrans::tool {

namespace {

using Json = nlohmann::ordered_json;

double microseconds(std::chrono::nanoseconds duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

Json to_json(const ErrorCounts& counts) {
  Json all = Json::object();
  counts.for_each([&all](const char* name, std::uint64_t count) { all[name] = count; });
  return all;
}

Json to_json(const RequestCounts& counts) {
  return {{"made", counts.made},
          {"sent", counts.sent},
          {"answered", counts.answered},
          {"timed_out", counts.timed_out},
          {"cancelled", counts.cancelled},
          {"refused", counts.refused},
          {"connection_lost", counts.connection_lost},
          {"pending", counts.pending}};
}

Json to_json(const LatencyHistogram& latency) {
  Json buckets = Json::array();
  latency.for_each_bucket([&](std::chrono::nanoseconds from, std::chrono::nanoseconds below, std::uint64_t count) {
    const bool last = below == std::chrono::nanoseconds::max();
    buckets.push_back(Json::array({microseconds(from), last ? Json() : Json(microseconds(below)), count}));
  });
  return {{"count", latency.count()},
          {"min", microseconds(latency.min())},
          {"mean", microseconds(latency.mean())},
          {"p50", microseconds(latency.quantile(0.5))},
          {"p90", microseconds(latency.quantile(0.9))},
          {"p99", microseconds(latency.quantile(0.99))},
          {"p999", microseconds(latency.quantile(0.999))},
          {"max", microseconds(latency.max())},
          {"total", microseconds(latency.total())},
          {"buckets", std::move(buckets)}};
}

Json to_json(const ControlStats& control) {
  return {{"commands", control.commands},      {"waiting", control.waiting},      {"refused", control.refused},
          {"reordered", control.reordered},    {"failed", control.failed},        {"events", control.events},
          {"dropped", control.events_dropped}, {"missed", control.events_missed}, {"lag", control.event_lag},
          {"subscribers", control.subscribers}};
}

Json to_json(const RefusalCounts& refusals) {
  return {{"sessions", refusals.sessions},         {"address", refusals.address},       {"rate", refusals.rate},
          {"address_rate", refusals.address_rate}, {"on_connect", refusals.on_connect}, {"timeout", refusals.timeout}};
}

Json to_json(const ListenerStats& listener) {
  return {{"url", listener.endpoint.url()},
          {"sessions", listener.sessions},
          {"sessions_total", listener.sessions_total},
          {"sessions_refused", listener.sessions_refused},
          {"accept_failures", listener.accept_failures},
          {"handshake_failures", listener.handshake_failures},
          {"packets_in", listener.packets_in},
          {"packets_out", listener.packets_out},
          {"bytes_in", listener.bytes_in},
          {"bytes_out", listener.bytes_out}};
}

Json to_json(const ServerStats& stats) {
  return {{"sessions", stats.sessions},
          {"sessions_total", stats.sessions_total},
          {"sessions_refused", stats.sessions_refused},
          {"refusals", to_json(stats.refusals)},
          {"awaiting_admission", stats.awaiting_admission},
          {"sessions_swept", stats.sessions_swept},
          {"accept_failures", stats.accept_failures},
          {"handshake_failures", stats.handshake_failures},
          {"handshake_failures_by", to_json(stats.handshake_failures_by)},
          {"ends", to_json(stats.ends)},
          {"protocol_errors", stats.protocol_errors},
          {"handler_failures", stats.handler_failures},
          {"packets_in", stats.packets_in},
          {"packets_out", stats.packets_out},
          {"bytes_in", stats.bytes_in},
          {"bytes_out", stats.bytes_out},
          {"throttled", stats.throttled},
          {"rejected_inbound", stats.rejected_inbound},
          {"rejected_outbound", stats.rejected_outbound},
          {"interceptor_failures", stats.interceptor_failures},
          {"queued_packets", stats.queued_packets},
          {"queued_bytes", stats.queued_bytes},
          {"unhandled", stats.unhandled},
          {"dropped_oldest", stats.dropped_oldest},
          {"dropped_at_close", stats.dropped_at_close},
          {"dropped_inbound", stats.dropped_inbound},
          {"unmatched_responses", stats.unmatched_responses},
          {"requests_received", stats.requests_received},
          {"answers_sent", stats.answers_sent},
          {"requests", to_json(stats.requests_by_outcome)},
          {"request_latency_us", to_json(stats.request_latency)},
          {"compressed_packets", stats.compressed_packets},
          {"compressed_bytes_before", stats.compressed_bytes_before},
          {"compressed_bytes_after", stats.compressed_bytes_after},
          {"incompressible_packets", stats.incompressible_packets},
          {"control", to_json(stats.control)}};
}

}  // namespace

StatisticsPrinter::StatisticsPrinter(const ServerTransport& server, std::chrono::nanoseconds interval, bool as_json)
    : server_(server), interval_(interval), as_json_(as_json) {
  if (interval_.count() != 0) thread_ = std::thread([this] { run(); });
}

StatisticsPrinter::~StatisticsPrinter() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  thread_.join();
  print();  // so that the lines add up
}

void StatisticsPrinter::run() {
  std::unique_lock lock(mutex_);
  for (auto next = began_ + interval_;; next = std::max(next + interval_, Clock::now())) {
    if (changed_.wait_until(lock, next, [this] { return stopping_; })) return;
    print();
  }
}

void StatisticsPrinter::print() {
  const auto stats = server_.stats();
  const auto now = Clock::now();
  const double passed = std::max(std::chrono::duration<double>(now - last_).count(), 1e-9);
  const double elapsed = std::chrono::duration<double>(now - began_).count();
  const auto rate = [passed](std::uint64_t after, std::uint64_t before) {
    return static_cast<double>(after - before) / passed;
  };
  const double in = rate(stats.packets_in, before_.packets_in), out = rate(stats.packets_out, before_.packets_out);
  const double bytes_in = rate(stats.bytes_in, before_.bytes_in);
  const double bytes_out = rate(stats.bytes_out, before_.bytes_out);
  if (as_json_) {
    Json listeners = Json::array();
    for (const auto& listener : server_.listener_stats()) listeners.push_back(to_json(listener));
    const Json line{
        {"elapsed", elapsed},
        {"interval", passed},
        {"rates", Json{{"packets_in", in}, {"packets_out", out}, {"bytes_in", bytes_in}, {"bytes_out", bytes_out}}},
        {"server", to_json(stats)},
        {"listeners", std::move(listeners)}};
    std::printf("%s\n", line.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
  } else {
    const auto more = [this, &stats](std::uint64_t ServerStats::*counter) {
      return static_cast<unsigned long long>(stats.*counter - before_.*counter);
    };
    constexpr double mega = 1e6;
    std::printf(
        "%.3f s: %zu sessions, in %.1f/s %.3f MB/s, out %.1f/s %.3f MB/s, queued %llu packets %.3f MB, "
        "dropped %llu, refused %llu, protocol errors %llu",
        elapsed, stats.sessions, in, bytes_in / mega, out, bytes_out / mega,
        static_cast<unsigned long long>(stats.queued_packets), static_cast<double>(stats.queued_bytes) / mega,
        more(&ServerStats::dropped_oldest) + more(&ServerStats::dropped_at_close), more(&ServerStats::sessions_refused),
        more(&ServerStats::protocol_errors));
    if (const auto latency = stats.request_latency.since(before_.request_latency); !latency.empty()) {
      std::printf(", %.1f answers/s p50 %.3f ms p99 %.3f ms", static_cast<double>(latency.count()) / passed,
                  microseconds(latency.quantile(0.5)) / 1000, microseconds(latency.quantile(0.99)) / 1000);
    }
    std::printf("\n");
  }
  std::fflush(stdout);
  before_ = stats;
  last_ = now;
}

}  // namespace msgtrans::tool
