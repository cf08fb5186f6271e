// SPDX-License-Identifier: Apache-2.0

// The library under the same load as its rivals: public API only, one shard.
//
// bench_msgtrans_server [--port N] [--transport tcp|tls|unix|ws|wss] [--fanout | --coroutines]
//
// --path names a Unix socket (@name: abstract), --certificate and --key the files in PEM form that tls and wss want.

#include "common.hpp"

#include <msgtrans/msgtrans.hpp>
#include <span>
#include <vector>

namespace {

/// A coroutine for each session.
boost::asio::awaitable<void> echo(msgtrans::SessionActor actor) {
  while (auto message = co_await actor.receive()) {
    if (message->is_request()) {
      message->respond(message->payload());
    } else {
      actor.session().send(message->payload(), {.biz_type = message->biz_type()});
    }
  }
}

int run(msgtrans::ServerTransport& server, const msgtrans::Endpoint& endpoint) {
  std::printf("listening %s %s\n", std::string(to_string(endpoint.transport)).c_str(), endpoint.to_string().c_str());
  std::fflush(stdout);
  server.run();
  return 0;
}

msgtrans::Endpoint endpoint_of(const bench::Arguments& arguments) {
  const std::string transport = arguments.text("--transport", "tcp");
  if (transport == "unix") return msgtrans::unix_socket(arguments.text("--path", "@msgtrans-bench"));
  const std::string address = "127.0.0.1:" + std::to_string(arguments.number<std::uint16_t>("--port", 0, 0, 65535));
  if (transport == "tcp") return msgtrans::tcp(address);
  if (transport == "tls") return msgtrans::tls(address);
  if (transport == "ws") return msgtrans::websocket(address);
  if (transport == "wss") return msgtrans::websocket_tls(address);
  throw std::invalid_argument("--transport wants tcp, tls, unix, ws or wss, not '" + transport + "'");
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run_main("bench_msgtrans_server", [&] {
    const bench::Arguments arguments(argc, argv, {"--port", "--transport", "--path", "--certificate", "--key"},
                                     {"--fanout", "--coroutines"});
    const bool fanout = arguments.has("--fanout");
    bench::raise_descriptor_limit(64);

    msgtrans::ServerTransport server({.shards = 1});
    const msgtrans::Endpoint wanted = endpoint_of(arguments);
    msgtrans::ListenOptions options;
    if (is_encrypted(wanted.transport)) {
      options.tls.identity.certificate_file = arguments.text("--certificate", "");
      options.tls.identity.key_file = arguments.text("--key", "");
    }
    const auto endpoint = server.listen(wanted, options);
    if (arguments.has("--coroutines")) {
      server.on_session(echo);
      return run(server, endpoint);
    }
    server.on_message([&](msgtrans::Session& session, const msgtrans::Message& message) {
      if (message.is_request()) {
        session.respond(message, message.payload());
        return;
      }
      const auto payload = message.payload();
      if (fanout && message.biz_type() == bench::biz_fanout_trigger &&
          payload.size() == bench::fanout_trigger_payload) {
        const auto* trigger = reinterpret_cast<const std::uint8_t*>(payload.data());
        const std::uint32_t count = bench::load_u32(trigger);
        const std::vector<std::byte> packet(bench::load_u32(trigger + 4), std::byte{bench::fanout_fill});
        for (std::uint32_t i = 0; i < count; ++i) {
          const auto result = server.broadcast(std::span<const std::byte>(packet), {.biz_type = bench::biz_fanout});
          // What did not get through shows as packets missing at the load generator; this says why.
          if (result.dropped != 0 || result.refused != 0) {
            std::fprintf(stderr, "broadcast: %llu queued, %llu dropped, %llu refused\n",
                         static_cast<unsigned long long>(result.queued),
                         static_cast<unsigned long long>(result.dropped),
                         static_cast<unsigned long long>(result.refused));
          }
        }
        return;
      }
      session.send(payload, {.biz_type = message.biz_type()});
    });
    return run(server, endpoint);
  });
}
