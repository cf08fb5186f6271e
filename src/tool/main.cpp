// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

#include <cstdio>
#include <exception>
#include <msgtrans/version.hpp>

int main(int argc, char** argv) {
  using namespace msgtrans::tool;
  CLI::App app{"msgtrans: serve, try and measure a message transport"};
  app.name("msgtrans");
  app.set_version_flag("--version", msgtrans::version);
  app.require_subcommand(1);
  Action action;
  add_serve(app, action);
  add_send(app, action);
  add_bench(app, action);
  add_cert(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {  // --help, --version
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    app.exit(error);  // says what is wrong on standard error
    return exit_usage;
  }
  try {
    return action();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "msgtrans: %s\n", error.what());
    return exit_failure;
  }
}
