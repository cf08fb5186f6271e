// SPDX-License-Identifier: Apache-2.0
#pragma once

/// All of msgtrans.
#include <msgtrans/client_transport.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/message.hpp>
#include <msgtrans/send.hpp>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/session/session.hpp>
#include <msgtrans/session/session_manager.hpp>
#include <msgtrans/session_id.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <msgtrans/version.hpp>
