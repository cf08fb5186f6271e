// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The facades, and all that they give and take. The channels (`channel/`), the lock-free parts (`lockfree/`), the
/// free-standing actors (`actor/`), what a transport of one's own implements (`transport/custom_transport.hpp`) and the
/// test kit (`testing/`) are included by themselves.
#include <msgtrans/admission.hpp>
#include <msgtrans/client_transport.hpp>
#include <msgtrans/control.hpp>
#include <msgtrans/drain_options.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/event.hpp>
#include <msgtrans/handover.hpp>
#include <msgtrans/interceptor.hpp>
#include <msgtrans/message.hpp>
#include <msgtrans/pool/connection_pool.hpp>
#include <msgtrans/pool/health_checker.hpp>
#include <msgtrans/pool/load_balancer.hpp>
#include <msgtrans/reconnect_options.hpp>
#include <msgtrans/send.hpp>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/session/groups.hpp>
#include <msgtrans/session/session.hpp>
#include <msgtrans/session/session_manager.hpp>
#include <msgtrans/session_id.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/statistics.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <msgtrans/transport/listening_socket.hpp>
#include <msgtrans/transport/peer_credentials.hpp>
#include <msgtrans/transport/tls.hpp>
#include <msgtrans/transport/websocket.hpp>
#include <msgtrans/version.hpp>
