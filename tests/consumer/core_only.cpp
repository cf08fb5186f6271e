// SPDX-License-Identifier: Apache-2.0
// A consumer of msgtrans::core alone: no compiled library is linked.
#include <cstddef>
#include <iostream>
#include <msgtrans/channel/sync_channel.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <msgtrans/session_id.hpp>
#include <msgtrans/version.hpp>
#include <msgtrans/wire/encoder.hpp>
#include <vector>

int main() {
  const std::vector<std::byte> payload(5, std::byte{'x'});
  msgtrans::wire::Header header;
  header.type = msgtrans::wire::PacketType::request;
  header.message_id = 7;
  std::vector<std::byte> packet;
  msgtrans::wire::append_packet(packet, header, {}, payload);

  msgtrans::SyncChannel<int> channel(msgtrans::ChannelCapacity::bounded(1));
  msgtrans::lockfree::LockFreeHashMap<msgtrans::SessionId, int> map;
  if (channel.try_send(1) != msgtrans::ChannelStatus::ok || !map.insert(msgtrans::SessionId(1), 1)) return 1;

  std::cout << "core " << msgtrans::version << ": a packet of " << packet.size() << " bytes\n";
  return packet.size() == msgtrans::wire::packet_size(0, payload.size()) ? 0 : 1;
}
