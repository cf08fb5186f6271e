// SPDX-License-Identifier: Apache-2.0
#include "broadcast.hpp"

#include <algorithm>
#include <span>
#include <utility>

namespace msgtrans::detail {

/// One message to many sessions of one shard.
class BroadcastCommand final : public Command {
 public:
  BroadcastCommand(std::shared_ptr<Shard> shard, const wire::Header& header, std::span<const std::byte> extension,
                   protocol::SharedBytes payload, Packing packing)
      : shard_(std::move(shard)),
        header_(header),
        extension_(extension.begin(), extension.end()),
        payload_(std::move(payload)),
        packing_(packing) {
    header_.compression = packing.codec;
  }
  ~BroadcastCommand() override {
    for (const auto& session : to_) session->unreserve(size(), high_priority());
  }

  void add(const SessionPtr& session) { to_.push_back(session); }
  [[nodiscard]] std::size_t size_of_audience() const noexcept { return to_.size(); }
  [[nodiscard]] const std::shared_ptr<Shard>& shard() const noexcept { return shard_; }
  /// Before it is posted: a shard need not be kept by what waits in it.
  [[nodiscard]] std::shared_ptr<Shard> take_shard() noexcept { return std::move(shard_); }

  void run(std::unique_ptr<Command>) noexcept override {
    for (auto& session : std::exchange(to_, {})) session->take(header_, extension_, payload_, packing_);
  }

 private:
  [[nodiscard]] std::size_t size() const noexcept { return wire::header_size + extension_.size() + payload_->size(); }
  [[nodiscard]] bool high_priority() const noexcept { return (header_.flags & wire::flags::high_priority) != 0; }

  std::shared_ptr<Shard> shard_;
  wire::Header header_;
  std::vector<std::byte> extension_;
  protocol::SharedBytes payload_;
  Packing packing_;
  std::vector<SessionPtr> to_;
};

Broadcast::Broadcast(BytesView payload, const SendOptions& options)
    : payload_(payload), options_(options), header_(header_for(wire::PacketType::one_way, options)) {}

Broadcast::~Broadcast() = default;

Broadcast::Form& Broadcast::form_for(const SessionState& session) {
  const auto how = packing_of(session.options(), options_.compression, payload_.size());
  for (auto& form : forms_) {
    if (form.how.codec == how.codec && form.how.level == how.level) return form;
  }
  const PackedPayload packed(how, payload_);
  const std::span<const std::byte> bytes = packed.bytes();
  return forms_.emplace_back(
      Form{how, packed.packing(), std::make_shared<const std::vector<std::byte>>(bytes.begin(), bytes.end()), {}});
}

BroadcastCommand& Broadcast::command_for(Form& form, Shard& shard) {
  const auto found =
      std::ranges::find(form.commands, &shard, [](const auto& command) { return command->shard().get(); });
  if (found != form.commands.end()) return **found;
  return *form.commands.emplace_back(std::make_unique<BroadcastCommand>(
      shard.shared_from_this(), header_, options_.extension, form.payload, form.packing));
}

void Broadcast::add(const SessionPtr& session) {
  const std::size_t extension = options_.extension.size();
  if (session->check(0, extension) != SendResult::queued) {
    ++result_.refused;
    return;
  }
  Form& form = form_for(*session);
  if (session->check(form.payload->size(), extension) != SendResult::queued) {
    ++result_.refused;
    return;
  }
  const std::size_t size = wire::header_size + extension + form.payload->size();
  const auto place = session->reserve(size, options_.high_priority);
  if (place != SendResult::queued) {
    ++(place == SendResult::would_block ? result_.dropped : result_.refused);
    return;
  }
  try {
    command_for(form, session->shard()).add(session);
  } catch (...) {
    session->unreserve(size, options_.high_priority);
    throw;
  }
  ++result_.queued;
}

BroadcastResult Broadcast::send() noexcept {
  for (auto& form : forms_) {
    for (auto& command : form.commands) {
      const std::size_t count = command->size_of_audience();
      const auto shard = command->take_shard();
      if (shard->post(std::unique_ptr<Command>(std::move(command)))) continue;
      result_.queued -= count;
      result_.refused += count;
    }
  }
  return result_;
}

}  // namespace msgtrans::detail
